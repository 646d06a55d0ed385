"""How every command reads its flags and YAML files, and what it answers to a mistyped one."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from rerank_fast.cli.help import Help, arrange

_REQUIRED = re.compile(r"arguments are required: (.*)")
_UNKNOWN_COMMAND = re.compile(r"(?<!--completion: )invalid choice: '?([^' ]*)")
_UNKNOWN_KEY = re.compile(r"[Oo]ption '(?:\w+\.)?([^']+)'.*")
_PLAINLY = (
    (r'Parser key "(?:\w+\.)?(\w+)":?', r"--\1:"),
    (r"^argument (--\w+)(?:/--[\w-]+)*:", r"\1:"),
    (r"^Unexpected config: ?(.*)", r"--config: expected settings as in {seed: 1}, got '\1'"),
    (r"^Problems parsing config", r"--config: not YAML"),
    (r' in "<unicode string>"', ""),
    (r"<class 'NoneType'>|NoneType", "null"),
    (r"<class '([\w.]+)'>", r"\1"),
    (r"typing\.Literal\[", "one of ["),
    (
        r"Does not validate .*? Subtypes: \[(.*)\] Errors: .* Given value: ",
        r"expected one of \1, got ",
    ),
    (r"Expected an? (.*)\. Got value: ", r"expected \1, got "),
    (r"expected one of one of \[(.*?)\], null", r"expected one of [\1, null]"),
    (r"invalid choice: '(.*)' \(choose from (.*)\)", r"expected one of \2, got \1"),
)


class CommandParser(ArgumentParser):
    """A parser whose flags and YAML keys take hyphens for underscores.

    What it can't read is answered in two lines, with the nearest flag or command, and exit code 2.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def of_command(self, name: str) -> CommandParser:
        """Of one of the commands that were added."""
        assert self._subcommands_action is not None
        return self._subcommands_action.choices[name]

    def finish(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Once all options are there: hyphens, and the groups in which --help shows them."""
        self._accept_hyphens()
        arrange(self, groups)

    def _accept_hyphens(self) -> None:
        """Of all flags that there are by now."""
        for action in self._actions:
            for flag in [flag for flag in action.option_strings if "_" in flag]:
                hyphens = flag.replace("_", "-")
                action.option_strings = [*action.option_strings, hyphens]
                self._option_string_actions[hyphens] = action

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Any:
        args = sys.argv[1:] if args is None else args
        # The one flag that the library knows in one spelling only.
        spelled = ["--print_config" if one == "--print-config" else one for one in args]
        return super().parse_args(spelled, *rest, **options)

    def _check_value_key(
        self,
        action: argparse.Action,
        value: Any,
        *rest: Any,
        **options: Any,
    ) -> Any:
        if isinstance(value, str) and action.nargs in ("+", "*"):  # one of several, in a YAML file
            value = [value]
        return super()._check_value_key(action, value, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self._asked(message)
        prog = parser.prog.replace(" [options]", "")
        print(f"{prog}: error: {parser._explained(message)}", file=sys.stderr)
        print(f"{prog} --help shows what there is", file=sys.stderr)
        self.exit(2)

    def _asked(self, message: str) -> CommandParser:
        """The parser of the command that lacks an argument; this one for any other message."""
        missing = _REQUIRED.search(message)
        known = self._subcommands_action.choices if self._subcommands_action else {}
        return known.get(missing[1].partition(".")[0], self) if missing else self

    def _explained(self, message: str) -> str:
        message = " ".join(message.split())
        flags = [flag for action in self._actions for flag in action.option_strings]
        names = [flag[2:] for flag in flags if flag.startswith("--") and "-" not in flag[2:]]
        rest = message.partition("unrecognized arguments: ")[2].split()
        if rest:
            unknown = next((one.partition("=")[0] for one in rest if one.startswith("-")), None)
            if unknown is None:
                return f"no flag takes {' '.join(rest)}"
            return f"unknown flag {unknown}{_nearest(unknown.lstrip('-'), names, '--')}"
        if match := _UNKNOWN_KEY.search(message):
            return f"unknown key {match[1]}{_nearest(match[1], names)}"
        commands = list(self._subcommands_action.choices) if self._subcommands_action else []
        if commands and (match := _UNKNOWN_COMMAND.search(message)):
            known = f"; there are {', '.join(commands)}"
            return f"unknown command {match[1]}{_nearest(match[1], commands) or known}"
        if commands and "was not provided" in message:
            return f"expected a command: {', '.join(commands)}"
        if match := _REQUIRED.search(message):
            missing = ", ".join(f"--{key.rpartition('.')[2]}" for key in match[1].split(", "))
            return f"{missing} must be given"
        return _plainly(message)


def _plainly(message: str) -> str:
    """jsonargparse's and argparse's errors of a value, in fewer words."""
    for pattern, plain in _PLAINLY:
        message = re.sub(pattern, plain, message)
    return message


def _nearest(unknown: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(unknown.replace("-", "_"), known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def add_limits(parser: CommandParser) -> None:
    """What bounds a pair and a forward pass, of the commands that score."""
    parser.add_argument(
        "--max_length",
        type=int | None,
        default=None,
        help="longest pair in tokens; the model's own if left out",
    )
    parser.add_argument(
        "--batch_size",
        type=int | None,
        default=None,
        help="most pairs per forward pass; left out, their tokens decide",
    )


def command_parser(
    description: str,
    kind: type[CommandParser] = CommandParser,
    *,
    usage: str,
    examples: str,
) -> CommandParser:
    """Of one command: --config and --print_config, and whatever is added.

    Args:
        description: in a line; `rerank-fast --help` shows it too.
        usage: what must be given, after the command's name; a line for each way.
        examples: whole lines to copy.
    """
    parser = kind(description=description)
    parser.usage = f"rerank-fast {usage}".replace("\n", "\n       rerank-fast ")
    parser.epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file with any of these settings",
    )
    return parser


class VersionAction(argparse._VersionAction):
    """Looks for the kernels only when it is asked."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        from rerank_fast.cli.version import version_text

        print(version_text())
        parser.exit()

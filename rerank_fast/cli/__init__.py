"""The command rerank-fast: train, evaluate, score, mine, convert, export, recipes, demo."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rerank_fast.cli import convert, demo, evaluate, export, mine, recipes, score, train
from rerank_fast.cli.completion import SHELLS, CompletionAction
from rerank_fast.cli.errors import in_flags, is_users, one_line
from rerank_fast.cli.parser import CommandParser, VersionAction

_FILES: dict[str, Any] = {
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "mine": mine,
    "convert": convert,
    "export": export,
    "recipes": recipes,
    "demo": demo,
}


_EXAMPLES = """\
  rerank-fast demo
  rerank-fast train --model microsoft/MiniLM-L12-H384-uncased \\
    --train train.jsonl --eval eval.jsonl --output my-reranker
  rerank-fast evaluate --model my-reranker --data eval.jsonl
  rerank-fast score --model my-reranker --input pairs.jsonl --output s.parquet
  rerank-fast mine --queries BEIR-FOLDER --output train.jsonl"""


class _Commands(CommandParser):
    """All commands; its help is one screen."""

    def format_help(self, formatter: Any = None) -> str:
        assert self._subcommands_action is not None
        lines = [
            f"usage: {self.prog} COMMAND [options]",
            "",
            str(self.description),
            "",
            "commands:",
        ]
        for name, command in self._subcommands_action.choices.items():
            lines.append(f"  {name:<9} {command.description}")
        lines += ["", "options:"]
        for action in self._actions:
            if action.help is not argparse.SUPPRESS and action.option_strings:
                flag = f"{action.option_strings[-1]} {action.metavar or ''}"
                lines.append(f"  {flag:<19} {action.help}")
        lines += ["", "examples:", _EXAMPLES, "", f"{self.prog} COMMAND --help shows its options."]
        return "\n".join(lines) + "\n"


def make_parser() -> CommandParser:
    parser = _Commands(prog="rerank-fast", description="Train and run cross-encoder rerankers.")
    parser.add_argument("--version", action=VersionAction, help="what is installed and what runs")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show an error's traceback; also after the command",
    )
    parser.add_argument(
        "--completion",
        action=CompletionAction,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print what completes a line on Tab: {', '.join(SHELLS)}",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, file in _FILES.items():
        command = file.make_parser()
        commands.add_subcommand(name, command, help=command.description)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, 2 for a bad argument or input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [one for one in arguments if one != "--debug"]
    if not sys.stderr.isatty():  # bars are for eyes: also those of libraries, which read this
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # What is set aside or left out of the data belongs to a run's record; one process says it.
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("rerank_fast.data").setLevel(logging.INFO)
    parser, command, options = make_parser(), "", dict[str, Any]()
    try:
        command = (parsed := parser.parse_args(arguments)).command
        options = parsed[command].as_dict()
        options.pop("config", None)
        if command == "train":
            # A setting that has its default may have been asked for all the same.
            given = parser.parse_args(arguments, defaults=False).train
            train.check(options, given.as_dict(), parser.of_command(command).error)
        _FILES[command].run(dict(options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        if debug:
            traceback.print_exc()
        flags = {name: f"--{name}" for name in options}
        if command == "train":
            flags = train.spelled(options)
        message = in_flags(one_line(error), flags)
        print(f"{f'rerank-fast {command}'.strip()}: error: {message}", file=sys.stderr)
        return 2
    return 0

"""How --help shows options: in groups, each with what it takes and its default."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

_NUMBERS = {int: "N", float: "X"}
_WIDEST = 30  # of choices that stand beside a flag; more of them follow its help
_PRINT_CONFIG = "print the settings as YAML, as --config takes it, and exit"


class Help(DefaultHelpFormatter):
    """Shows a flag in one of its spellings, with a short word for what it takes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        # Hyphens for underscores, and --name+ for one more of a list, go without saying.
        shown.option_strings = [
            flag for flag in action.option_strings if "-" not in flag[2:] and flag[-1] != "+"
        ]
        if _takes_value(action) and (action.metavar is None or _choices(action)):
            shown.metavar = _metavar(action)
            shown.choices = None
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str:
        said = _as_yaml(re.sub(r"(?<!\.)\.$", "", action.help or ""))
        choices = _choices(action)
        notes = []
        if choices and _metavar(action) == "NAME":
            notes.append(f"one of {', '.join(choices)}")
        if action.required:
            notes.append("required")
        elif _takes_value(action) and action.default not in (None, argparse.SUPPRESS, [], {}):
            notes.append(f"default: {_as_yaml(str(action.default))}")
        return said + (f" ({'; '.join(notes)})" if notes else "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Lines stay lines in examples."""
        if text.startswith("examples:"):
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


def arrange(parser: ArgumentParser, groups: Mapping[str, Sequence[str]]) -> None:
    """Show a parser's options in these groups, each in its order.

    --help, --config and --print_config stand first, without a group of their own.

    Raises:
        ValueError: an option is in no group, or a group has one that there is not.
    """
    actions = {action.dest: action for action in parser._actions if _takes_part(action)}
    named = [name for names in groups.values() for name in names]
    if sorted(named) != sorted(actions):
        odd = sorted({*named} ^ {*actions})
        raise ValueError(f"expected each option in one group, got {odd} in none or several")
    for group in parser._action_groups:
        group._group_actions = [one for one in group._group_actions if not _takes_part(one)]
    for action in parser._actions:
        if "--print_config" in action.option_strings:
            action.help, action.metavar = _PRINT_CONFIG, ""
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        group._group_actions.extend(actions[name] for name in names)


def _as_yaml(text: str) -> str:
    """Python's words for nothing, yes and no as a command line and a YAML file have them."""
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(?:None|True|False)\b", lambda word: words[word[0]], text)


def _takes_part(action: argparse.Action) -> bool:
    return action.dest not in (
        "help",
        "config",
        "print_config",
        argparse.SUPPRESS,
    ) and not isinstance(action, argparse._SubParsersAction)


def _takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0 and bool(action.option_strings)


def _hint(action: argparse.Action) -> Any:
    """What a value is, but for null."""
    hint = getattr(action, "_typehint", None) or action.type
    if get_origin(hint) in (Union, UnionType):
        kinds = [one for one in get_args(hint) if one is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def _choices(action: argparse.Action) -> list[str]:
    hint = _hint(action)
    if hint is bool:
        return ["true", "false"]
    return [str(one) for one in get_args(hint)] if get_origin(hint) is Literal else []


def _metavar(action: argparse.Action) -> str:
    hint = _hint(action)
    if choices := _choices(action):
        beside = "{" + ",".join(choices) + "}"
        return beside if len(beside) <= _WIDEST else "NAME"
    if get_origin(hint) is dict:
        return "JSON"
    return _NUMBERS.get(hint, action.dest.upper())

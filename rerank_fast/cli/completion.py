"""rerank-fast --completion SHELL: what makes the Tab key know commands, flags, values and files."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

SHELLS = ("bash", "zsh")
# Options whose values are files or folders, of whichever command.
_PATHS = (
    "cache_folder", "config", "corpus", "cross_encoder", "data", "details", "eval",
    "input", "model", "output", "queries", "retriever", "train",
)  # fmt: skip


class CompletionAction(argparse.Action):
    """Prints the script of a shell."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, *rest: Any
    ) -> NoReturn:
        assert isinstance(parser, ArgumentParser)
        print(completion_script(parser, values))
        sys.exit(0)  # parser.exit() is no longer to be had


def completion_script(parser: ArgumentParser, shell: str) -> str:
    """The script for a shell, one of SHELLS. The parser can't be used after it.

    Raises:
        ImportError: shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("--completion needs shtab: pip install shtab") from error
    assert parser._subcommands_action is not None
    for command in parser._subcommands_action.choices.values():
        for action in command._actions:
            if action.dest in _PATHS:
                action.complete = shtab.FILE
            # One spelling is enough for Tab.
            action.option_strings = [
                flag for flag in action.option_strings if "-" not in flag[2:] and flag[-1] != "+"
            ]
    return parser.get_completion_script(f"shtab-{shell}")

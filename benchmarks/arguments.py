"""How every script reads its arguments: python -m benchmarks.<room>.<script> --help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A module's docstring as it stands, and each option's default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)


def make_parser(module: str) -> argparse.ArgumentParser:
    """Of a module by its __name__: its docstring says what it does. Options have underscores."""
    found = sys.modules[module]
    named = found.__spec__.name if found.__spec__ else module
    return argparse.ArgumentParser(
        prog=f"python -m {named.removesuffix('.__main__')}",
        description=found.__doc__,
        formatter_class=_Formatter,
    )


def add_rows(parser: argparse.ArgumentParser) -> None:
    """The option of a script whose figures stand in the documents."""
    text = "a JSON file of the run, for python -m benchmarks report --add"
    parser.add_argument("--rows", type=Path, help=text)

"""The command rerank-fast: train, evaluate, score, mine, convert, export, recipes, demo."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rerank_fast.cli import convert, demo, evaluate, export, mine, recipes, score, train
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


def make_parser() -> CommandParser:
    parser = CommandParser(prog="rerank-fast", description="Train and run cross-encoder rerankers.")
    parser.add_argument("--version", action=VersionAction, help="what is installed and what runs")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show an error's traceback; also after the command",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, file in _FILES.items():
        command = file.make_parser()
        command.accept_hyphens()
        commands.add_subcommand(name, command, help=command.description)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, 2 for a bad argument or input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [one for one in arguments if one != "--debug"]
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
            train.check(options, given.as_dict(), parser.error)
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
        print(f"rerank-fast {command}: error: {message}", file=sys.stderr)
        return 2
    return 0

"""The command rerank-fast: train, evaluate, score, mine, convert, export, recipes, demo."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from rerank_fast.cli.errors import in_flags, is_users, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, 2 for a bad argument or input, 130 after Ctrl-C, 141 where what reads the
    output is gone.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, and not when the interpreter ends
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still to be written has no reader: let it go, or the interpreter tries it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    # Here, so that a Ctrl-C while they are imported is one like any other.
    from rerank_fast.cli.commands import FILES, make_parser, train

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
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
        FILES[command].run(dict(options))
    except BrokenPipeError:
        raise
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

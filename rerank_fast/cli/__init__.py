"""The command rerank-fast: train, evaluate, score, mine, export, recipes, demo."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from rerank_fast.cli import evaluate, export, mine, score, train

_FILES = {"train": train, "evaluate": evaluate, "score": score, "mine": mine, "export": export}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="rerank-fast", description="Train and run cross-encoder rerankers.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, file in _FILES.items():
        commands.add_subcommand(name, file.make_parser())

    recipes = ArgumentParser(description="Print the names of the recipes, or the YAML of one.")
    recipes.add_argument("name", type=str | None, nargs="?", default=None)
    commands.add_subcommand("recipes", recipes)

    demo = ArgumentParser(description="Train a reranker on the documentation of installed packages, offline.")
    demo.add_argument("--output", type=str, default="rerank-fast-demo", help="directory of the model")
    demo.add_argument("--max_steps", type=int, default=-1, help="fewer optimizer steps, for a quick look")
    demo.add_argument("--seed", type=int, default=12)
    commands.add_subcommand("demo", demo)
    return parser


def _recipes(options: dict[str, Any]) -> None:
    from rerank_fast.recipes import recipe_names, recipe_text

    if options["name"] is not None:
        print(recipe_text(options["name"]), end="")
        return
    for name in recipe_names():
        print(f"{name}\n{recipe_text(name)}")


def _demo(options: dict[str, Any]) -> None:
    from rerank_fast.demo import run_demo

    run_demo(**options)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, 2 for a bad argument or input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = _parser()
    parsed = parser.parse_args(argv)
    options = parsed[parsed.command].as_dict()
    if parsed.command == "train" and options["recipe"] is None and None in (options["model"], options["train"]):
        parser.error("train needs --model and --train, or --recipe")
    commands: dict[str, Callable[[dict[str, Any]], None]] = {
        **{name: file.run for name, file in _FILES.items()},
        "recipes": _recipes,
        "demo": _demo,
    }
    try:
        commands[parsed.command](options)
    except (ValueError, FloatingPointError, MemoryError, OSError) as error:  # OSError: a full disk
        print(f"rerank-fast {parsed.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

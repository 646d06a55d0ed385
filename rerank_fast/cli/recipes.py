"""rerank-fast recipes: whole runs by name."""

from __future__ import annotations

import argparse
from typing import Any

from rerank_fast.cli.parser import CommandParser, command_parser


def make_parser() -> CommandParser:
    parser = command_parser(
        "Print all recipes with their settings, or one of them.",
        usage="recipes [NAME]",
        examples=(
            "rerank-fast recipes own-lists-lambdaloss\n"
            "rerank-fast train --recipe own-lists-lambdaloss --set lists=train.jsonl"
        ),
    )
    parser.add_argument(
        "name",
        type=str | None,
        nargs="?",
        default=argparse.SUPPRESS,
        help="of the recipe to print; all are printed without it",
    )
    parser.finish({"recipe": ["name"]})
    return parser


def run(options: dict[str, Any]) -> None:
    from rerank_fast.recipes import recipe_names, recipe_text

    if (name := options.get("name")) is not None:
        print(recipe_text(name), end="")
        return
    for name in recipe_names():
        print(f"{name}\n{recipe_text(name)}")

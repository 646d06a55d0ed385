"""rerank-fast demo: a reranker of what is installed here, offline."""

from __future__ import annotations

from typing import Any

from rerank_fast.cli.parser import CommandParser, command_parser


def make_parser() -> CommandParser:
    parser = command_parser("Train a reranker on the documentation of installed packages, offline.")
    parser.add_argument(
        "--output",
        type=str,
        default="rerank-fast-demo",
        help="directory of the model",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model there, also where no demo made it",
    )
    parser.add_argument(
        "--max_steps",
        type=int,
        default=-1,
        help="optimizer steps, fewer for a quick look; -1: one pass over the lists",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=12,
        help="of the lists, the fresh head and dropout",
    )
    return parser


def run(options: dict[str, Any]) -> None:
    from rerank_fast.demo import run_demo

    run_demo(**options)

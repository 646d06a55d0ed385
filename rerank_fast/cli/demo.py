"""rerank-fast demo: a reranker of what is installed here, offline."""

from __future__ import annotations

from typing import Any

from rerank_fast.cli.parser import CommandParser, command_parser


def make_parser() -> CommandParser:
    parser = command_parser(
        "Train on the documentation of the packages installed here, offline.",
        usage="demo [options]",
        examples="rerank-fast demo\nrerank-fast demo --max_steps 20 --output a-quick-look",
    )
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
    parser.finish({"run": ["max_steps", "seed"], "output": ["output", "overwrite"]})
    return parser


def run(options: dict[str, Any]) -> None:
    from rerank_fast.demo import run_demo
    from rerank_fast.training.events import TrainingInterrupted

    try:
        run_demo(**options)
    except TrainingInterrupted:
        print("A demo does not go on from a checkpoint: the same command begins anew.")
        raise

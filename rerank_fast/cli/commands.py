"""All commands of rerank-fast, and the one screen that --help shows of them."""

from __future__ import annotations

import argparse
from typing import Any

from rerank_fast.cli import convert, demo, evaluate, export, mine, recipes, score, train
from rerank_fast.cli.completion import SHELLS, CompletionAction
from rerank_fast.cli.parser import CommandParser, VersionAction

FILES: dict[str, Any] = {
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
    for name, file in FILES.items():
        command = file.make_parser()
        commands.add_subcommand(name, command, help=command.description)
    return parser

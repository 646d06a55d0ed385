"""The command rerank-fast: train, evaluate, demo."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from rerank_fast.training.config import TrainingConfig


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="rerank-fast", description="Train and run cross-encoder rerankers.")
    commands = parser.add_subcommands(required=True, dest="command")

    train = ArgumentParser(description="Fine-tune a reranker on ranking lists with LambdaLoss.")
    train.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    train.add_argument("--model", type=str, required=True, help="directory or hub id of an encoder or reranker")
    train.add_argument("--train", type=str, required=True, help="lists: .jsonl, .parquet, saved dataset or hub id")
    train.add_argument("--eval", type=str | None, default=None, help="lists to choose the best model by")
    _add_columns(train)
    train.add_argument("--overwrite", action="store_true", help="replace a model that output already holds")
    train.add_class_arguments(TrainingConfig, skip={"overwrite"})
    commands.add_subcommand("train", train)

    evaluate = ArgumentParser(description="Rerank lists and print MAP, MRR and NDCG.")
    evaluate.add_argument("--model", type=str, required=True, help="directory or hub id of a reranker")
    evaluate.add_argument(
        "--data", type=str, required=True, help="lists: .jsonl, .parquet, saved dataset or hub id"
    )
    _add_columns(evaluate)
    evaluate.add_argument("--output", type=str | None, default=None, help="JSON file for the metrics")
    evaluate.add_argument("--at_k", type=int, default=10, help="cut of MRR and NDCG")
    evaluate.add_argument("--max_length", type=int | None, default=None, help="longest pair in tokens")
    evaluate.add_argument("--batch_size", type=int, default=64, help="pairs per forward pass")
    commands.add_subcommand("evaluate", evaluate)

    demo = ArgumentParser(description="Train a reranker on the documentation of installed packages, offline.")
    demo.add_argument("--output", type=str, default="rerank-fast-demo", help="directory of the model")
    demo.add_argument("--max_steps", type=int, default=-1, help="fewer optimizer steps, for a quick look")
    demo.add_argument("--seed", type=int, default=12)
    commands.add_subcommand("demo", demo)
    return parser


def _add_columns(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="""the lists' own names of query, docs and labels, e.g. '{"docs": "passages"}'""",
    )


def _lists(source: str, columns: dict[str, str] | None) -> Any:
    """The source as it is, or read here where its columns have other names."""
    if columns is None:
        return source
    from rerank_fast.data.lists import load_lists

    return load_lists(source, columns=columns)


def _train(options: dict[str, Any]) -> None:
    model, train, evaluation = options.pop("model"), options.pop("train"), options.pop("eval")
    columns = options.pop("columns")
    options.pop("config", None)
    config = TrainingConfig(**options)  # a wrong value is said before torch is imported

    from rerank_fast.training.trainer import Trainer

    trainer = Trainer(
        model,
        _lists(train, columns),
        eval_lists=evaluation and _lists(evaluation, columns),
        config=config,
    )
    result = trainer.train()
    print(
        f"{result.steps} steps in {result.seconds:.0f} s; model of step {result.best_step} saved to {result.output}"
    )
    if result.metrics:
        _print_metrics(result.metrics)


def _evaluate(options: dict[str, Any]) -> None:
    from rerank_fast.evaluation.reranking import RerankingEvaluator
    from rerank_fast.model.cross_encoder import CrossEncoder

    evaluator = RerankingEvaluator(
        _lists(options["data"], options["columns"]),
        at_k=options["at_k"],
        batch_size=options["batch_size"],
        show_progress_bar=True,
    )
    output = Path(options["output"]) if options["output"] else None
    if output and not output.parent.is_dir():
        raise ValueError(f"--output {output}: directory {output.parent} does not exist")
    metrics = evaluator(CrossEncoder(options["model"], max_length=options["max_length"]))
    _print_metrics(metrics)
    if output:
        output.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _print_metrics(metrics: dict[str, float]) -> None:
    print(f"{'metric':<10} {'base':>8} {'reranked':>9} {'change':>8}")
    for name, value in metrics.items():
        if not name.startswith("base_"):
            base = metrics[f"base_{name}"]
            print(f"{name:<10} {base:>8.4f} {value:>9.4f} {value - base:>+8.4f}")


def _demo(options: dict[str, Any]) -> None:
    from rerank_fast.demo import run_demo

    run_demo(**options)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, 2 for a bad argument or input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parsed = _parser().parse_args(argv)
    options = parsed[parsed.command].as_dict()
    try:
        {"train": _train, "evaluate": _evaluate, "demo": _demo}[parsed.command](options)
    except (ValueError, FloatingPointError) as error:
        print(f"rerank-fast {parsed.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

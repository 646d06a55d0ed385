"""The command rerank-fast: train, evaluate, recipes, demo."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from rerank_fast.training.config import TrainingConfig


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="rerank-fast", description="Train and run cross-encoder rerankers.")
    commands = parser.add_subcommands(required=True, dest="command")

    train = ArgumentParser(description="Fine-tune a reranker on ranking lists with LambdaLoss.")
    train.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    train.add_argument(
        "--recipe", type=str | None, default=None, help="a whole run by name; see rerank-fast recipes"
    )
    train.add_argument(
        "--set",
        type=str,
        nargs="+",
        action="append",
        default=None,
        help="key=value ... in place of the recipe's own",
    )
    train.add_argument(
        "--model", type=str | None, default=None, help="directory or hub id of an encoder or reranker"
    )
    train.add_argument(
        "--train", type=str | None, default=None, help="lists: .jsonl, .parquet, saved dataset or hub id"
    )
    train.add_argument("--eval", type=str | None, default=None, help="lists to choose the best model by")
    _add_columns(train)
    train.add_argument("--overwrite", action="store_true", help="replace a model that output already holds")
    train.add_class_arguments(TrainingConfig, skip={"overwrite"})
    commands.add_subcommand("train", train)

    evaluate = ArgumentParser(
        description="Rerank lists or NanoBEIR and print MAP, MRR and NDCG; compare two models."
    )
    evaluate.add_argument(
        "--model",
        type=str,
        action="append",
        required=True,
        help="directory or hub id of a reranker; given twice, the two are compared with a paired test",
    )
    evaluate.add_argument("--data", type=str | None, default=None, help="lists: .jsonl, .parquet, saved or hub id")
    _add_columns(evaluate)
    evaluate.add_argument(
        "--nano_beir",
        type=str,
        nargs="*",
        default=None,
        help="rerank these NanoBEIR sets (none named: all but two)",
    )
    evaluate.add_argument(
        "--nano_beir_id", type=str, default="sentence-transformers/NanoBEIR-en", help="hub id or local copy"
    )
    evaluate.add_argument("--rerank_k", type=int, default=100, help="documents of NanoBEIR's BM25 rankings")
    evaluate.add_argument(
        "--metrics", type=str, nargs="+", default=[], help="further ones of ir-measures: R@100 ..."
    )
    evaluate.add_argument("--output", type=str | None, default=None, help="JSON file for the metrics")
    evaluate.add_argument(
        "--details", type=str | None, default=None, help="directory for per-query CSV files and TREC runs"
    )
    evaluate.add_argument("--at_k", type=int, default=10, help="cut of MRR and NDCG")
    evaluate.add_argument("--max_length", type=int | None, default=None, help="longest pair in tokens")
    evaluate.add_argument("--batch_size", type=int | None, default=None, help="most pairs per forward pass")
    commands.add_subcommand("evaluate", evaluate)

    recipes = ArgumentParser(description="Print the names of the recipes, or the YAML of one.")
    recipes.add_argument("name", type=str | None, nargs="?", default=None)
    commands.add_subcommand("recipes", recipes)

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
    trainer = _recipe_trainer(options) if options["recipe"] is not None else _trainer(options)
    result = trainer.train()
    if not trainer.processes.is_main_process:
        return
    print(
        f"{result.steps} steps in {result.seconds:.0f} s; model of step {result.best_step} saved to {result.output}"
    )
    if result.metrics:
        _print_metrics(result.metrics)


def _recipe_trainer(options: dict[str, Any]) -> Any:
    from rerank_fast.recipes import load_recipe

    # A flag beside the recipe would be ignored: say so.
    defaults = _parser().parse_args(["train"])["train"].as_dict()
    given = [name for name, value in options.items() if name not in ("recipe", "set") and value != defaults[name]]
    if given:
        raise ValueError(f"with --recipe, settings go as --set {given[0]}=...; got {', '.join(given)}")
    recipe = load_recipe(options["recipe"], [override for group in options["set"] or [] for override in group])

    from rerank_fast.training.from_recipe import build_trainer

    return build_trainer(recipe)


def _trainer(options: dict[str, Any]) -> Any:
    if options["set"]:
        raise ValueError("--set overrides a recipe: it needs --recipe")
    model, train, evaluation, columns = (options[name] for name in ("model", "train", "eval", "columns"))
    names = {field.name for field in fields(TrainingConfig)}
    # A wrong value is said before torch is imported.
    config = TrainingConfig(**{name: value for name, value in options.items() if name in names})

    from rerank_fast.data.lists import ListStream
    from rerank_fast.training.trainer import Trainer

    return Trainer(
        model,
        ListStream(train, columns=columns) if config.streaming else _lists(train, columns),
        eval_lists=evaluation and _lists(evaluation, columns),
        config=config,
    )


def _evaluate(options: dict[str, Any]) -> None:
    models = options["model"]
    if len(models) > 2:
        raise ValueError(f"--model takes one or two models, got {len(models)}")
    output = Path(options["output"]) if options["output"] else None
    if output and not output.parent.is_dir():
        raise ValueError(f"--output {output}: directory {output.parent} does not exist")
    evaluator = _evaluator(options)

    from rerank_fast.model.cross_encoder import CrossEncoder

    details = Path(options["details"]) if options["details"] else None

    def loaded(path: str) -> CrossEncoder:
        return CrossEncoder(path, max_length=options["max_length"])

    result: dict[str, Any]
    if len(models) == 1:
        result = evaluator(loaded(models[0]), output_path=details and str(details))
        _print_metrics(result)
    else:
        directories = [details and str(details / letter) for letter in "ab"]
        values = [
            evaluator.evaluate_per_query(loaded(path), to) for path, to in zip(models, directories, strict=True)
        ]
        result = _compare(models, *values)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _evaluator(options: dict[str, Any]) -> Any:
    """The evaluator of --data or of --nano_beir."""
    if (options["data"] is None) == (options["nano_beir"] is None):
        raise ValueError("evaluate takes either --data or --nano_beir")
    from rerank_fast.evaluation import NanoBEIREvaluator, RerankingEvaluator

    common = {
        "at_k": options["at_k"],
        "metrics": options["metrics"],
        "batch_size": options["batch_size"],
        "show_progress_bar": True,
        "write_per_query": True,
        "write_run": True,
    }
    if options["data"] is not None:
        return RerankingEvaluator(_lists(options["data"], options["columns"]), **common)
    return NanoBEIREvaluator(
        options["nano_beir"] or None, options["nano_beir_id"], rerank_k=options["rerank_k"], **common
    )


def _compare(models: Sequence[str], a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Print, and return, how two models' per-query values differ."""
    from rerank_fast.evaluation import compare

    rows = {name: compare(a[name], b[name]) for name in a if not _is_base(name, a)}
    width = max(map(len, rows))
    print(f"A {models[0]}\nB {models[1]}")
    print(f"{'metric':<{width}} {'A':>8} {'B':>8} {'B - A':>8} {'95% interval':>20} {'p':>8}")
    for name, row in rows.items():
        interval = f"[{row.low:+.4f}, {row.high:+.4f}]"
        means = f"{row.a:>8.4f} {row.b:>8.4f} {row.difference:>+8.4f}"
        print(f"{name:<{width}} {means} {interval:>20} {row.p_value:>8.4f}")
    return {"a": models[0], "b": models[1], "metrics": {name: asdict(row) for name, row in rows.items()}}


def _base_of(name: str, metrics: Mapping[str, Any]) -> str | None:
    """The first stage's metric beside a metric: base_ stands before it, after the evaluator's name."""
    places = [0, *(i + 1 for i, letter in enumerate(name) if letter == "_")]
    return next((key for i in places if (key := f"{name[:i]}base_{name[i:]}") in metrics), None)


def _is_base(name: str, metrics: Mapping[str, Any]) -> bool:
    return any(_base_of(other, metrics) == name for other in metrics)


def _print_metrics(metrics: Mapping[str, float]) -> None:
    names = [name for name in metrics if not _is_base(name, metrics)]
    width = max(10, *map(len, names))
    print(f"{'metric':<{width}} {'base':>8} {'reranked':>9} {'change':>8}")
    for name in names:
        value, base = metrics[name], _base_of(name, metrics)
        before = (
            f"{metrics[base]:>8.4f} {value:>9.4f} {value - metrics[base]:>+8.4f}" if base else f"{value:>18.4f}"
        )
        print(f"{name:<{width}} {before}")


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
    commands = {"train": _train, "evaluate": _evaluate, "recipes": _recipes, "demo": _demo}
    try:
        commands[parsed.command](options)
    except (ValueError, FloatingPointError, OSError) as error:  # OSError: a full disk
        print(f"rerank-fast {parsed.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

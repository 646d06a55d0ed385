"""The command rerank-fast: train, evaluate, score, mine, export, recipes, demo."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

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
    train.add_argument(
        "--push",
        type=str | None,
        default=None,
        help="hub repository (user/name) for the trained model and its card; made private where it is not there",
    )
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
    evaluate.add_argument("--dtype", type=str | None, default=None, help="auto, int8, bfloat16 ...")
    evaluate.add_argument("--batch_size", type=int | None, default=None, help="most pairs per forward pass")
    commands.add_subcommand("evaluate", evaluate)

    commands.add_subcommand("mine", _mine_parser())

    export = ArgumentParser(description="Write an ONNX file of a reranker and check its scores.")
    export.add_argument("--model", type=str, required=True, help="directory or hub id of a reranker")
    export.add_argument("--format", type=Literal["onnx"], default="onnx")
    export.add_argument("--dtype", type=Literal["fp32", "int8"], default="fp32", help="int8 quantises dynamically")
    export.add_argument(
        "--output", type=str | None, default=None, help="directory of the whole model; by default --model's own"
    )
    export.add_argument("--data", type=str | None, default=None, help="lists to check with, 200 pairs of them")
    _add_columns(export)
    export.add_argument("--tolerance", type=float | None, default=None, help="largest difference of a score")
    export.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    commands.add_subcommand("export", export)

    score = ArgumentParser(
        description="Score a file's pairs; started again after a kill, it goes on. Shards under accelerate launch."
    )
    score.add_argument("--model", type=str, required=True, help="directory or hub id of a reranker")
    score.add_argument(
        "--input", type=str, required=True, help=".jsonl or .parquet with query and document, or query and docs"
    )
    score.add_argument(
        "--output", type=str, required=True, help=".parquet file for the scores, in the input's order"
    )
    score.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="""the input's own names of query and document (or docs), e.g. '{"document": "passage"}'""",
    )
    score.add_argument("--keep", type=str, nargs="+", default=[], help="columns of the input to copy to the output")
    score.add_argument(
        "--dtype", type=str | None, default=None, help="auto, int8, bfloat16 ...; the checkpoint's own if left out"
    )
    score.add_argument("--max_length", type=int | None, default=None, help="longest pair in tokens")
    score.add_argument("--batch_size", type=int | None, default=None, help="most pairs per forward pass")
    score.add_argument("--rows_per_part", type=int, default=4096, help="rows in memory at a time")
    score.add_argument("--prompt", type=str | None, default=None, help="goes before each query")
    score.add_argument(
        "--overwrite", action="store_true", help="replace the output, and parts of a run with other settings"
    )
    commands.add_subcommand("score", score)

    recipes = ArgumentParser(description="Print the names of the recipes, or the YAML of one.")
    recipes.add_argument("name", type=str | None, nargs="?", default=None)
    commands.add_subcommand("recipes", recipes)

    demo = ArgumentParser(description="Train a reranker on the documentation of installed packages, offline.")
    demo.add_argument("--output", type=str, default="rerank-fast-demo", help="directory of the model")
    demo.add_argument("--max_steps", type=int, default=-1, help="fewer optimizer steps, for a quick look")
    demo.add_argument("--seed", type=int, default=12)
    commands.add_subcommand("demo", demo)
    return parser


def _mine_parser() -> ArgumentParser:
    mine = ArgumentParser(description="Mine hard negatives: ranking lists from queries, positives and a corpus.")
    mine.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    mine.add_argument(
        "--queries",
        type=str,
        required=True,
        help="query with positives (texts), positive_ids, or docs and labels: .jsonl, .parquet, saved or hub id",
    )
    mine.add_argument(
        "--corpus", type=str | None, default=None, help="text and id; left out: the texts that the queries have"
    )
    mine.add_argument("--output", type=str, required=True, help=".jsonl or .parquet; continued where it exists")
    mine.add_argument("--overwrite", action="store_true", help="begin anew where output exists")
    mine.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="""the sources' own names, e.g. '{"query": "question", "text": "passage"}'""",
    )
    mine.add_argument("--retriever", type=str, default="bm25", help="bm25, or a sentence-transformers model")
    mine.add_argument("--query_prompt", type=str | None, default=None, help="put before each query to encode")
    mine.add_argument("--corpus_prompt", type=str | None, default=None, help="put before each document to encode")
    mine.add_argument("--similarity", type=Literal["cosine", "dot"], default="cosine")
    mine.add_argument("--cache_folder", type=str | None, default=None, help="keeps embeddings between runs")
    mine.add_argument("--embedding_dtype", type=Literal["float32", "float16"], default="float32")
    mine.add_argument("--use_faiss", action="store_true", help="search with FAISS instead of torch")
    mine.add_argument("--cross_encoder", type=str | None, default=None, help="rescores: directory or hub id")
    mine.add_argument("--max_length", type=int | None, default=None, help="of the cross-encoder's pairs in tokens")
    mine.add_argument("--dtype", type=str | None, default=None, help="of its weights; auto: the fastest")
    mine.add_argument("--num_negatives", type=int, default=9, help="most per list")
    mine.add_argument("--range_min", type=int, default=0, help="skip this many of the best candidates")
    mine.add_argument("--range_max", type=int | None, default=None, help="candidates up to this rank")
    mine.add_argument("--max_score", type=float | None, default=None, help="skip higher-scored candidates")
    mine.add_argument("--min_score", type=float | None, default=None, help="skip lower-scored candidates")
    mine.add_argument(
        "--absolute_margin", type=float | None, default=None, help="least distance below the lowest positive"
    )
    mine.add_argument(
        "--relative_margin", type=float | None, default=None, help="the same as a fraction of the positive's score"
    )
    mine.add_argument("--sampling_strategy", type=Literal["top", "random"], default="top")
    mine.add_argument(
        "--labels",
        type=Literal["relevance", "teacher", "scores"],
        default="relevance",
        help="teacher: the cross-encoder's scores scaled per list to 0-4; scores: as they are",
    )
    mine.add_argument("--seed", type=int, default=12)
    mine.add_argument("--batch_size", type=int | None, default=None, help="texts or pairs per forward pass")
    mine.add_argument("--query_batch_size", type=int, default=1024, help="queries searched together")
    mine.add_argument("--show_progress_bar", type=bool, default=True)
    return mine


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
    if options["push"] is not None:  # a repository that can't be made is known before hours of training
        from rerank_fast.model.storage import create_repository

        create_repository(options["push"], private=True, token=None)
    trainer = _recipe_trainer(options) if options["recipe"] is not None else _trainer(options)
    result = trainer.train()
    if not trainer.processes.is_main_process:
        return
    print(
        f"{result.steps} steps in {result.seconds:.0f} s; model of step {result.best_step} saved to {result.output}"
    )
    if result.metrics:
        _print_metrics(result.metrics)
    if options["push"] is not None:
        from rerank_fast.model.cross_encoder import CrossEncoder

        print(CrossEncoder(result.output, device="cpu").push_to_hub(options["push"]))


def _recipe_trainer(options: dict[str, Any]) -> Any:
    from rerank_fast.recipes import load_recipe

    # A flag beside the recipe would be ignored: say so.
    defaults = _parser().parse_args(["train"])["train"].as_dict()
    given = [
        name for name, value in options.items() if name not in ("recipe", "set", "push") and value != defaults[name]
    ]
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
        return CrossEncoder(path, max_length=options["max_length"], dtype=options["dtype"])

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


def _is_base(name: str, metrics: Mapping[str, Any]) -> bool:
    from rerank_fast.training.card_results import base_of

    return any(base_of(other, metrics) == name for other in metrics)


def _print_metrics(metrics: Mapping[str, float]) -> None:
    from rerank_fast.training.card_results import base_of

    names = [name for name in metrics if not _is_base(name, metrics)]
    width = max(10, *map(len, names))
    print(f"{'metric':<{width}} {'base':>8} {'reranked':>9} {'change':>8}")
    for name in names:
        value, base = metrics[name], base_of(name, metrics)
        before = (
            f"{metrics[base]:>8.4f} {value:>9.4f} {value - metrics[base]:>+8.4f}" if base else f"{value:>18.4f}"
        )
        print(f"{name:<{width}} {before}")


def _mine(options: dict[str, Any]) -> None:
    dense = {
        name: options.pop(name)
        for name in ("query_prompt", "corpus_prompt", "similarity", "cache_folder", "embedding_dtype", "use_faiss")
    }
    options.pop("config", None)
    max_length, dtype = options.pop("max_length"), options.pop("dtype")

    from rerank_fast.data.mining import DenseRetriever, mine_hard_negatives

    if options["retriever"] != "bm25":
        dense["batch_size"] = options["batch_size"]
        options["retriever"] = DenseRetriever(_sentence_transformer(options["retriever"]), **dense)
    if options["cross_encoder"] is not None:
        from rerank_fast.model.cross_encoder import CrossEncoder

        options["cross_encoder"] = CrossEncoder(options["cross_encoder"], max_length=max_length, dtype=dtype)
    result = mine_hard_negatives(options.pop("queries"), options.pop("corpus"), **options)
    resumed = f" ({result.resumed_lists} of an earlier run)" if result.resumed_lists else ""
    print(f"{result.lists} lists{resumed} in {result.output}")
    print(f"{result.documents} documents ({result.duplicate_documents} duplicates left out)")
    print(f"{result.queries} queries, {result.queries_without_positive} more without a positive left out")
    if new := result.lists - result.resumed_lists:
        print(f"{result.positives} positives and {result.negatives} negatives, {result.negatives / new:.1f} a list")
    print(f"{result.queries_without_negative} queries without a negative left out")
    print(f"{result.lists_with_fewer_negatives} lists have fewer than {options['num_negatives']} negatives")
    for name, count in result.skipped_candidates.items():
        print(f"{count} candidates skipped by {name} {options[name]}")


def _sentence_transformer(path: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            "--retriever with a model needs sentence-transformers: pip install sentence-transformers"
        ) from error
    try:
        return SentenceTransformer(path)
    except Exception as error:  # of many kinds: network, missing files, wrong configuration
        raise ValueError(f"--retriever {path} is no sentence-transformers model: {error}") from error


def _export(options: dict[str, Any]) -> None:
    from rerank_fast.model.cross_encoder import CrossEncoder
    from rerank_fast.model.export import export_onnx

    model, output = CrossEncoder(options["model"], device="cpu"), options["output"]
    if output is None and not Path(options["model"]).is_dir():
        raise ValueError(f"--model {options['model']} is no directory to write to: --output names one")
    pairs = None
    if options["data"] is not None:
        lists = _lists(options["data"], options["columns"])
        from rerank_fast.data.lists import load_lists

        rows = load_lists(lists)
        pairs = list(islice(((row["query"], doc) for row in rows for doc in row["docs"]), 200))
    if output is not None:
        model.save_pretrained(output, overwrite=options["overwrite"])
    done = export_onnx(
        model,
        output or options["model"],
        dtype=options["dtype"],
        pairs=pairs,
        tolerance=options["tolerance"],
        overwrite=options["overwrite"],
    )
    print(
        f"{done.file}: {done.file.stat().st_size / 2**20:.1f} MiB, {done.dtype}; scores of {done.pairs} pairs "
        f"differ from PyTorch's by at most {done.max_difference:.2e} (tolerance {done.tolerance:.2e}, range of the "
        f"scores {done.score_range:.2e})"
    )


def _score(options: dict[str, Any]) -> None:
    from rerank_fast.model.cross_encoder import CrossEncoder
    from rerank_fast.score_file import process_state, score_file

    state = process_state()
    model_options = {name: options.pop(name) for name in ("dtype", "max_length")}
    model = CrossEncoder(options.pop("model"), device=state.device, **model_options)
    source, output = options.pop("input"), options.pop("output")
    result = score_file(model, source, output, show_progress_bar=state.is_main_process, **options)
    if result.truncated:
        logging.warning(
            "%d of %d pairs are longer than max_length=%d tokens and were truncated.",
            result.truncated,
            result.scored,
            model.max_length,
        )
    if state.is_main_process:
        print(f"{result.rows} rows in {output}; {result.scored} pairs scored now by this process")


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
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "score": _score,
        "mine": _mine,
        "export": _export,
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

"""rerank-fast evaluate: one model measured, or two compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rerank_fast.cli.lists import LISTS, Source, add_columns, lists_of, refuse
from rerank_fast.cli.parser import CommandParser, add_limits, command_parser


def make_parser() -> CommandParser:
    parser = command_parser(
        "Rerank lists or NanoBEIR; print MAP, MRR, NDCG; compare two models.",
        usage=(
            "evaluate --model MODEL --data LISTS [options]\n"
            "evaluate --model MODEL --nano_beir [SET ...] [options]"
        ),
        examples=(
            "rerank-fast evaluate --model my-reranker --data eval.jsonl --metrics R@5\n"
            "rerank-fast evaluate --model A --model B --data eval.jsonl --details runs\n"
            "rerank-fast evaluate --model my-reranker --nano_beir msmarco nq"
        ),
    )
    parser.add_argument(
        "--model",
        type=str,
        nargs="+",
        action="extend",
        required=True,
        help="directory or hub id of a reranker; given twice, the two are compared with a paired "
        "test",
    )
    parser.add_argument("--data", type=Source | None, default=None, help=LISTS)
    add_columns(parser)
    parser.add_argument(
        "--nano_beir",
        type=str,
        nargs="*",
        default=None,
        help="rerank these NanoBEIR sets (none named: all but two)",
    )
    parser.add_argument(
        "--nano_beir_id",
        type=str,
        default="sentence-transformers/NanoBEIR-en",
        help="hub id or local copy",
    )
    parser.add_argument(
        "--rerank_k", type=int, default=100, help="documents of NanoBEIR's BM25 rankings"
    )
    parser.add_argument(
        "--metrics", type=str, nargs="+", default=[], help="further ones of ir-measures: R@100 ..."
    )
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for the metrics")
    parser.add_argument(
        "--details",
        type=str | None,
        default=None,
        help="directory for per-query CSV files and TREC runs",
    )
    parser.add_argument("--at_k", type=int, default=10, help="cut of MRR and NDCG")
    parser.add_argument(
        "--dtype",
        type=str,
        nargs="+",
        action="extend",
        default=None,
        help="auto, int8, bfloat16 ...; given twice, the model is compared with itself in another "
        "one",
    )
    add_limits(parser)
    parser.finish(
        {
            "data": ["data", "columns", "nano_beir", "nano_beir_id", "rerank_k"],
            "model": ["model", "dtype", "max_length"],
            "metrics": ["metrics", "at_k"],
            "batch": ["batch_size"],
            "output": ["output", "details"],
        }
    )
    return parser


def run(options: dict[str, Any]) -> None:
    models, dtypes = options["model"], options["dtype"] or [None]
    for name, values in (("model", models), ("dtype", dtypes)):
        if len(values) > 2:
            raise ValueError(f"--{name} is given once or twice, got {len(values)}")
    count = max(len(models), len(dtypes))
    models, dtypes = (values * (count // len(values)) for values in (models, dtypes))
    output, details = (
        None if path is None else Path(path)  # "" is a directory
        for path in (options["output"], options["details"])
    )
    _check_outputs(output, details, options["data"])
    evaluator = _evaluator(options)

    from rerank_fast.model.cross_encoder import CrossEncoder

    def loaded(path: str, dtype: str | None) -> CrossEncoder:
        return CrossEncoder(path, max_length=options["max_length"], dtype=dtype)

    result: dict[str, Any]
    if count == 1:
        model = loaded(models[0], dtypes[0])
        result = evaluator(model, output_path=details and str(details))
        print(f"{models[0]}, {model.dtype_name}")
        print_metrics(result)
    else:
        # One that can't be opened is known before the other is measured.
        loaded(models[1], dtypes[1])
        used, values = [], []
        for letter, path, dtype in zip("ab", models, dtypes, strict=True):
            model = loaded(path, dtype)
            values.append(evaluator.evaluate_per_query(model, details and str(details / letter)))
            used.append(model.dtype_name)
        print(f"A {models[0]}, {used[0]}\nB {models[1]}, {used[1]}")
        result = {"a": models[0], "b": models[1], "dtypes": used, "metrics": _compare(*values)}
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _check_outputs(output: Path | None, details: Path | None, data: Source | None) -> None:
    """Before hours of measuring."""
    from rerank_fast.data.writable import check_directory, check_file

    if output is not None:
        check_file(output, "output")
        if isinstance(data, str) and output.resolve() == Path(data).resolve():
            raise ValueError(f"output {output} is the data: expected another file")
    if details is not None:
        check_directory(details, "details")


def _evaluator(options: dict[str, Any]) -> Any:
    """The evaluator of --data or of --nano_beir."""
    if (options["data"] is None) == (options["nano_beir"] is None):
        raise ValueError("evaluate takes either --data or --nano_beir")
    if options["data"] is not None:
        refuse(
            options,
            make_parser().get_defaults().as_dict(),
            ["nano_beir_id", "rerank_k"],
            "it is of --nano_beir",
        )
    else:
        refuse(options, make_parser().get_defaults().as_dict(), ["columns"], "it is of --data")
    from rerank_fast.evaluation import NanoBEIREvaluator, RerankingEvaluator

    common = {
        "at_k": options["at_k"],
        "metrics": options["metrics"],
        "batch_size": options["batch_size"],
        "show_progress_bar": sys.stderr.isatty(),
        "write_per_query": True,
        "write_run": True,
    }
    if options["data"] is not None:
        return RerankingEvaluator(lists_of(options["data"], options["columns"]), **common)
    return NanoBEIREvaluator(
        options["nano_beir"] or None,
        options["nano_beir_id"],
        rerank_k=options["rerank_k"],
        **common,
    )


def _compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Print, and return, how two models' per-query values differ."""
    from rerank_fast.evaluation import compare

    rows = {name: compare(a[name], b[name]) for name in a if not _is_base(name, a)}
    width = max(map(len, rows))
    print(f"{'metric':<{width}} {'A':>8} {'B':>8} {'B - A':>8} {'95% interval':>20} {'p':>8}")
    for name, row in rows.items():
        interval = f"[{row.low:+.4f}, {row.high:+.4f}]"
        means = f"{row.a:>8.4f} {row.b:>8.4f} {row.difference:>+8.4f}"
        print(f"{name:<{width}} {means} {interval:>20} {row.p_value:>8.4f}")
    return {name: asdict(row) for name, row in rows.items()}


def _is_base(name: str, metrics: Mapping[str, Any]) -> bool:
    from rerank_fast.cards.results import base_of

    return any(base_of(other, metrics) == name for other in metrics)


def print_metrics(metrics: Mapping[str, float]) -> None:
    from rerank_fast.cards.results import base_of

    names = [name for name in metrics if not _is_base(name, metrics)]
    width = max(10, *map(len, names))
    print(f"{'metric':<{width}} {'base':>8} {'reranked':>9} {'change':>8}")
    for name in names:
        value, base = metrics[name], base_of(name, metrics)
        before = (
            f"{metrics[base]:>8.4f} {value:>9.4f} {value - metrics[base]:>+8.4f}"
            if base
            else f"{value:>18.4f}"
        )
        print(f"{name:<{width}} {before}")

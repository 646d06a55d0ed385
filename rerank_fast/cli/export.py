"""rerank-fast export: a reranker as an ONNX file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rerank_fast.cli.lists import Source, add_columns, lists_of, refuse
from rerank_fast.cli.parser import CommandParser, command_parser


def make_parser() -> CommandParser:
    parser = command_parser(
        "Write an ONNX file of a reranker and check its scores.",
        usage="export --model MODEL [options]",
        examples=(
            "rerank-fast export --model my-reranker\n"
            "rerank-fast export --model my-reranker --dtype int8 --data eval.jsonl"
        ),
    )
    parser.add_argument(
        "--model", type=str, required=True, help="directory or hub id of a reranker"
    )
    parser.add_argument("--format", type=Literal["onnx"], default="onnx", help="of the file")
    parser.add_argument(
        "--dtype", type=Literal["fp32", "int8"], default="fp32", help="int8 quantises dynamically"
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="directory of the whole model; by default --model's own",
    )
    parser.add_argument(
        "--data", type=Source | None, default=None, help="lists to check with, 200 pairs of them"
    )
    add_columns(parser)
    parser.add_argument(
        "--tolerance", type=float | None, default=None, help="largest difference of a score"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.finish(
        {
            "model": ["model", "format", "dtype"],
            "check": ["data", "columns", "tolerance"],
            "output": ["output", "overwrite"],
        }
    )
    return parser


def run(options: dict[str, Any]) -> None:
    if options["data"] is None:
        refuse(options, make_parser().get_defaults().as_dict(), ["columns"], "it is of --data")
    output = None if options["output"] is None else Path(options["output"])
    if output is not None:
        from rerank_fast.data.writable import check_directory
        from rerank_fast.model.storage import holds_model

        check_directory(output, "output")
        if holds_model(output) and not options["overwrite"]:
            held = "a model or a README.md"
            raise ValueError(f"output {output} already holds {held}; --overwrite replaces it")

    from rerank_fast.model.cross_encoder import CrossEncoder
    from rerank_fast.model.export import export_onnx

    model = CrossEncoder(options["model"], device="cpu")
    if output is None and not Path(options["model"]).is_dir():
        path = options["model"]
        raise ValueError(f"model {path} is no directory to write to: --output names one")
    pairs = None
    if options["data"] is not None:
        from rerank_fast.data.lists import load_lists

        rows = load_lists(lists_of(options["data"], options["columns"]))
        pairs = list(islice(((row["query"], doc) for row in rows for doc in row["docs"]), 200))
    done = export_onnx(
        model,
        output or options["model"],
        dtype=options["dtype"],
        pairs=pairs,
        tolerance=options["tolerance"],
        overwrite=options["overwrite"],
    )
    if output is not None:  # no model without what it was exported for
        model.save_pretrained(output, overwrite=options["overwrite"])
    print(
        f"{done.file}: {done.file.stat().st_size / 2**20:.1f} MiB, {done.dtype}; scores of "
        f"{done.pairs} pairs differ from PyTorch's by at most {done.max_difference:.2e} "
        f"(tolerance {done.tolerance:.2e}, range of the scores {done.score_range:.2e})"
    )

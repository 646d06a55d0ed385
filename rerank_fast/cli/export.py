"""rerank-fast export: a reranker as an ONNX file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from rerank_fast.cli.lists import add_columns, lists_of


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Write an ONNX file of a reranker and check its scores.")
    parser.add_argument("--model", type=str, required=True, help="directory or hub id of a reranker")
    parser.add_argument("--format", type=Literal["onnx"], default="onnx")
    parser.add_argument("--dtype", type=Literal["fp32", "int8"], default="fp32", help="int8 quantises dynamically")
    parser.add_argument(
        "--output", type=str | None, default=None, help="directory of the whole model; by default --model's own"
    )
    parser.add_argument("--data", type=str | None, default=None, help="lists to check with, 200 pairs of them")
    add_columns(parser)
    parser.add_argument("--tolerance", type=float | None, default=None, help="largest difference of a score")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def run(options: dict[str, Any]) -> None:
    from rerank_fast.model.cross_encoder import CrossEncoder
    from rerank_fast.model.export import export_onnx

    model, output = CrossEncoder(options["model"], device="cpu"), options["output"]
    if output is None and not Path(options["model"]).is_dir():
        raise ValueError(f"--model {options['model']} is no directory to write to: --output names one")
    pairs = None
    if options["data"] is not None:
        lists = lists_of(options["data"], options["columns"])
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

"""rerank-fast score: the scores of a file of pairs."""

from __future__ import annotations

import sys
from typing import Any

from rerank_fast.cli.parser import CommandParser, add_limits, command_parser


def make_parser() -> CommandParser:
    parser = command_parser(
        "Score a file of pairs; a killed run goes on, processes share it.",
        usage="score --model MODEL --input FILE --output FILE [options]",
        examples=(
            "rerank-fast score --model my-reranker --input pairs.jsonl --output s.parquet\n"
            "torchrun --nproc_per_node 2 -m rerank_fast score --model my-reranker ..."
        ),
    )
    parser.add_argument(
        "--model", type=str, required=True, help="directory or hub id of a reranker"
    )
    parser.add_argument(
        "--input",
        type=str,
        required=True,
        help=".jsonl, .csv, .tsv (also .gz, .zst) or .parquet with query and document, or query "
        "and docs",
    )
    parser.add_argument(
        "--output",
        type=str,
        required=True,
        help=".parquet file for the scores, in the input's order",
    )
    parser.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="the input's own names of query and document (or docs), e.g. "
        """'{"document": "passage"}'""",
    )
    parser.add_argument(
        "--keep", type=str, nargs="+", default=[], help="columns of the input to copy to the output"
    )
    parser.add_argument(
        "--dtype",
        type=str | None,
        default=None,
        help="auto, int8, bfloat16 ...; the checkpoint's own if left out",
    )
    add_limits(parser)
    parser.add_argument("--rows_per_part", type=int, default=4096, help="rows in memory at a time")
    parser.add_argument("--prompt", type=str | None, default=None, help="goes before each query")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the output, and parts of a run with other settings",
    )
    parser.finish(
        {
            "data": ["input", "columns", "keep", "prompt"],
            "model": ["model", "dtype", "max_length"],
            "batch": ["batch_size", "rows_per_part"],
            "output": ["output", "overwrite"],
        }
    )
    return parser


def run(options: dict[str, Any]) -> None:
    from accelerate.utils import broadcast_object_list

    from rerank_fast.model.cross_encoder import CrossEncoder
    from rerank_fast.model.precision.names import choose_precision
    from rerank_fast.score_file import process_state, score_file

    state = process_state()
    # What is measured is measured once: no two processes may score in different dtypes.
    (precision,) = broadcast_object_list([choose_precision(options.pop("dtype"), state.device)])
    model = CrossEncoder(
        options.pop("model"),
        device=state.device,
        dtype=precision,
        max_length=options.pop("max_length"),
    )
    source, output = options.pop("input"), options.pop("output")
    shows = state.is_main_process and sys.stderr.isatty()
    result = score_file(model, source, output, show_progress_bar=shows, **options)
    # its threads would abort a process that exits before they are done
    state.destroy_process_group()
    model.warn_of_truncation(result.truncated, result.scored)
    if state.is_main_process:
        now = f"{result.scored} pairs scored now by this process, in {model.dtype_name}"
        print(f"{result.rows} rows in {output}; {now}")

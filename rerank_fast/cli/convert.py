"""rerank-fast convert: pickled weights as safetensors; a head of the other kind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

from rerank_fast.cli.parser import CommandParser, command_parser


def make_parser() -> CommandParser:
    parser = command_parser(
        "Write pickled weights as safetensors, or a head of the other kind.",
        usage="convert --model DIR --output DIR [--head KIND]",
        examples=(
            "rerank-fast convert --model old-reranker --output safe-reranker\n"
            "rerank-fast convert --model my-reranker --head modular --output as-modules"
        ),
    )
    parser.add_argument(
        "--model", type=str, required=True, help="directory of a reranker, or hub id with --head"
    )
    parser.add_argument(
        "--output", type=str, required=True, help="directory of the converted model"
    )
    parser.add_argument(
        "--head",
        type=Literal["modular", "classification"] | None,
        default=None,
        help="modules of sentence-transformers, or transformers' sequence classifier; scores stay "
        "the same",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that output already holds"
    )
    parser.finish({"model": ["model", "head"], "output": ["output", "overwrite"]})
    return parser


def run(options: dict[str, Any]) -> None:
    from rerank_fast.data.writable import check_directory
    from rerank_fast.model.storage import holds_model
    from rerank_fast.model.storage.pickles import convert_pickles, pickled_weights

    source, output = Path(options["model"]), Path(options["output"])
    check_directory(output, "output")
    if holds_model(output) and not options["overwrite"]:
        raise ValueError(
            f"output {output} already holds a model or a README.md; --overwrite replaces it"
        )

    from rerank_fast.model.conversion import convert_head
    from rerank_fast.model.cross_encoder import CrossEncoder

    def opened(directory: str | Path) -> CrossEncoder:
        return CrossEncoder(directory, device="cpu")

    if options["head"] is None:
        for file in convert_pickles(source, output, opened):
            print(f"{file}: converted")
        print(f"{output}: safetensors")
        return
    with tempfile.TemporaryDirectory() as directory:
        if source.is_dir() and pickled_weights(source):
            source = Path(directory, "model")
            convert_pickles(Path(options["model"]), source, opened)
        model = opened(source if source.is_dir() else options["model"])
        model.name_or_path = options["model"]
        difference = convert_head(model, options["head"])
        model.save_pretrained(output, overwrite=options["overwrite"])
    print(f"{output}: a {options['head']} head, whose scores differ by at most {difference:.2e}")

"""rerank-fast mine: ranking lists with hard negatives."""

from __future__ import annotations

import sys
from typing import Any, Literal

from rerank_fast.cli.lists import Source, refuse
from rerank_fast.cli.parser import CommandParser, command_parser

_ENCODERS = (
    "query_prompt", "corpus_prompt", "similarity", "cache_folder", "embedding_dtype", "use_faiss",
)  # fmt: skip
# In which --help shows the options.
_GROUPS = {
    "data": ["queries", "corpus", "columns"],
    "first stage": ["retriever", *_ENCODERS],
    "rescoring": ["cross_encoder", "max_length", "dtype"],
    "choice of negatives": [
        "num_negatives",
        "sampling_strategy",
        "seed",
        "range_min",
        "range_max",
        "max_score",
        "min_score",
        "absolute_margin",
        "relative_margin",
    ],
    "batch": ["batch_size", "query_batch_size"],
    "output": ["output", "labels", "overwrite", "show_progress_bar"],
}


def make_parser() -> CommandParser:
    mine = command_parser(
        "Mine hard negatives: lists of queries, positives and a corpus.",
        usage="mine --queries SOURCE --output FILE [options]",
        examples=(
            "rerank-fast mine --queries q.jsonl --corpus docs.jsonl --output mined.jsonl\n"
            "rerank-fast mine --queries BEIR-FOLDER --output mined.parquet \\\n"
            "  --cross_encoder my-reranker --relative_margin 0.05"
        ),
    )
    _add_data(mine)
    _add_scorers(mine)
    _add_choice(mine)
    _add_output(mine)
    mine.finish(_GROUPS)
    return mine


def _add_data(mine: CommandParser) -> None:
    mine.add_argument(
        "--queries",
        type=Source,
        required=True,
        help="query with positives (texts), positive_ids, or lists of any layout; a BEIR folder "
        "has both",
    )
    mine.add_argument(
        "--corpus",
        type=Source | None,
        default=None,
        help="text and id; left out: the texts that the queries have",
    )
    mine.add_argument(
        "--columns",
        type=dict[str, str] | None,
        default=None,
        help="""the sources' own names, e.g. '{"query": "question", "text": "passage"}'""",
    )


def _add_scorers(mine: CommandParser) -> None:
    """Who finds candidates, and who scores them anew."""
    mine.add_argument(
        "--retriever", type=str, default="bm25", help="bm25, or a sentence-transformers model"
    )
    mine.add_argument(
        "--query_prompt", type=str | None, default=None, help="put before each query to encode"
    )
    mine.add_argument(
        "--corpus_prompt", type=str | None, default=None, help="put before each document to encode"
    )
    mine.add_argument(
        "--similarity",
        type=Literal["cosine", "dot"],
        default="cosine",
        help="of two embeddings",
    )
    mine.add_argument(
        "--cache_folder", type=str | None, default=None, help="keeps embeddings between runs"
    )
    mine.add_argument(
        "--embedding_dtype",
        type=Literal["float32", "float16"],
        default="float32",
        help="of the embeddings that are kept",
    )
    mine.add_argument("--use_faiss", action="store_true", help="search with FAISS instead of torch")
    mine.add_argument(
        "--cross_encoder", type=str | None, default=None, help="rescores: directory or hub id"
    )
    mine.add_argument(
        "--max_length",
        type=int | None,
        default=None,
        help="longest pair of the cross-encoder in tokens",
    )
    mine.add_argument(
        "--dtype", type=str | None, default=None, help="of its weights; auto: the fastest"
    )


def _add_choice(mine: CommandParser) -> None:
    """Which of the candidates become negatives."""
    mine.add_argument("--num_negatives", type=int, default=9, help="most per list")
    mine.add_argument(
        "--sampling_strategy",
        type=Literal["top", "random"],
        default="top",
        help="which of the candidates that are left: the best ones, or any",
    )
    mine.add_argument("--seed", type=int, default=12, help="of random sampling")
    mine.add_argument(
        "--range_min", type=int, default=0, help="skip this many of the best candidates"
    )
    mine.add_argument(
        "--range_max", type=int | None, default=None, help="candidates up to this rank"
    )
    mine.add_argument(
        "--max_score", type=float | None, default=None, help="skip higher-scored candidates"
    )
    mine.add_argument(
        "--min_score", type=float | None, default=None, help="skip lower-scored candidates"
    )
    mine.add_argument(
        "--absolute_margin",
        type=float | None,
        default=None,
        help="least distance below the lowest positive",
    )
    mine.add_argument(
        "--relative_margin",
        type=float | None,
        default=None,
        help="that distance as a fraction of the positive's score",
    )


def _add_output(mine: CommandParser) -> None:
    mine.add_argument(
        "--batch_size", type=int | None, default=None, help="texts or pairs per forward pass"
    )
    mine.add_argument(
        "--query_batch_size", type=int, default=1024, help="queries searched together"
    )
    mine.add_argument(
        "--output", type=str, required=True, help=".jsonl or .parquet; continued where it exists"
    )
    mine.add_argument(
        "--labels",
        type=Literal["relevance", "teacher", "scores"],
        default="relevance",
        help="teacher: the cross-encoder's scores scaled per list to 0-4; scores: as they are",
    )
    mine.add_argument("--overwrite", action="store_true", help="begin anew where output exists")
    mine.add_argument(
        "--show_progress_bar",
        type=bool,
        default=sys.stderr.isatty(),
        help="by default where there is a terminal",
    )


def run(options: dict[str, Any]) -> None:
    _refuse_unused(options)
    dense = {name: options.pop(name) for name in _ENCODERS}
    max_length, dtype = options.pop("max_length"), options.pop("dtype")

    from rerank_fast.data.mining import DenseRetriever, mine_hard_negatives

    if options["retriever"] != "bm25":
        dense["batch_size"] = options["batch_size"]
        options["retriever"] = DenseRetriever(_sentence_transformer(options["retriever"]), **dense)
    if options["cross_encoder"] is not None:
        from rerank_fast.model.cross_encoder import CrossEncoder

        options["cross_encoder"] = CrossEncoder(
            options["cross_encoder"], max_length=max_length, dtype=dtype
        )
    result = mine_hard_negatives(options.pop("queries"), options.pop("corpus"), **options)
    resumed = f" ({result.resumed_lists} of an earlier run)" if result.resumed_lists else ""
    print(f"{result.lists} lists{resumed} in {result.output}")
    print(f"{result.documents} documents ({result.duplicate_documents} duplicates left out)")
    print(
        f"{result.queries} queries, {result.queries_without_positive} more without a positive left "
        "out"
    )
    if new := result.lists - result.resumed_lists:
        print(
            f"{result.positives} positives and {result.negatives} negatives, "
            f"{result.negatives / new:.1f} a list"
        )
    print(f"{result.queries_without_negative} queries without a negative left out")
    print(
        f"{result.lists_with_fewer_negatives} lists have fewer than {options['num_negatives']} "
        "negatives"
    )
    for name, count in result.skipped_candidates.items():
        print(f"{count} candidates skipped by {name} {options[name]}")


def _refuse_unused(options: dict[str, Any]) -> None:
    defaults, bm25 = make_parser().get_defaults().as_dict(), options["retriever"] == "bm25"
    rescored = options["cross_encoder"] is not None
    if bm25:
        refuse(options, defaults, _ENCODERS, "it is an encoder's, and --retriever is bm25")
    if not rescored:
        refuse(options, defaults, ["max_length", "dtype"], "it is of --cross_encoder")
    if bm25 and not rescored:
        why = "it is of --cross_encoder and of an encoder as --retriever"
        refuse(options, defaults, ["batch_size"], why)


def _sentence_transformer(path: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            "--retriever with a model needs sentence-transformers: pip install "
            "sentence-transformers"
        ) from error
    from rerank_fast.model.storage.files import quiet_transformers

    try:
        with quiet_transformers():
            return SentenceTransformer(path)
    except Exception as error:  # of many kinds: network, missing files, wrong configuration
        raise ValueError(
            f"--retriever {path} is no sentence-transformers model: {error}"
        ) from error

"""Queries a second and peak memory of hard-negative mining over a synthetic corpus.

    python -m benchmarks.steps.mining                           # BM25
    python -m benchmarks.steps.mining --retriever dense         # exact search, random embeddings
    python -m benchmarks.steps.mining --retriever dense --peer  # and sentence-transformers'

Terms follow Zipf's law (a document has 20 to 120 of a vocabulary of 200,000; a query has terms of
its positive and others). The files are written first; each run is a process of its own that reads
them, and its peak resident memory counts everything: Python, torch, corpus, index, output. Nothing
else should use the machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import make_parser

SEED = 12
VOCABULARY = 200_000
WIDTH = 384  # of the random embeddings: all-MiniLM-L6-v2's


def write_collection(directory: Path, documents: int, queries: int) -> None:
    draw = np.random.default_rng(SEED)
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    words = np.char.add("w", np.arange(VOCABULARY).astype(str))

    def terms(count: int) -> np.ndarray:
        return words[np.searchsorted(cumulative, draw.random(count) * cumulative[-1])]

    texts = [terms(int(draw.integers(20, 121))) for _ in range(documents)]
    with open(directory / "corpus.jsonl", "w", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"id": i, "text": " ".join(text)}) + "\n")
    with open(directory / "queries.jsonl", "w", encoding="utf-8") as file:
        for _ in range(queries):
            positive = int(draw.integers(documents))
            own = draw.choice(texts[positive], int(draw.integers(3, 7)))
            query = " ".join([*own, *terms(int(draw.integers(1, 5)))])
            file.write(json.dumps({"query": query, "positive_ids": [positive]}) + "\n")


class RandomEmbeddings:
    """An encoder that takes no time: embeddings by the order in which texts come."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(SEED)

    def __call__(self, texts: list[str]) -> np.ndarray:
        return self.draw.standard_normal((len(texts), WIDTH), np.float32)


def _mine(directory: Path, options: argparse.Namespace) -> None:
    from rerank_fast.data import mine_hard_negatives

    retriever: Any = "bm25" if options.retriever == "bm25" else RandomEmbeddings()
    mine_hard_negatives(
        directory / "queries.jsonl",
        directory / "corpus.jsonl",
        output=directory / "mined.jsonl",
        retriever=retriever,
        num_negatives=options.num_negatives,
        relative_margin=0.05,
        show_progress_bar=False,
    )


def _mine_peer(directory: Path, options: argparse.Namespace) -> None:
    from types import SimpleNamespace

    import torch
    from datasets import Dataset
    from sentence_transformers.util import cos_sim, mine_hard_negatives, pairwise_cos_sim

    encode = RandomEmbeddings()

    def normalized(texts: list[str], **_: Any) -> np.ndarray:
        rows = encode(texts)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        encode_document=normalized,
        encode_query=normalized,
        similarity=cos_sim,
        similarity_pairwise=pairwise_cos_sim,
    )
    corpus, queries = (
        [
            json.loads(line)
            for line in (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("corpus", "queries")
    )
    texts = [row["text"] for row in corpus]
    pairs = {
        "query": [row["query"] for row in queries],
        "positive": [texts[row["positive_ids"][0]] for row in queries],
    }
    lists = mine_hard_negatives(
        Dataset.from_dict(pairs),
        model,
        corpus=texts,
        num_negatives=options.num_negatives,
        relative_margin=0.05,
        output_format="labeled-list",
        faiss_batch_size=1024,
        verbose=False,
    )
    lists.to_json(directory / "peer.jsonl")


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--num_negatives", type=int, default=9)
    parser.add_argument("--retriever", choices=["bm25", "dense"], default="bm25")
    parser.add_argument(
        "--peer", action="store_true", help="also sentence-transformers, which has no BM25"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        started = time.perf_counter()
        (_mine if options.run == "rerank_fast" else _mine_peer)(options.directory, options)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{options.run:<24} {seconds:>7.1f} s {options.queries / seconds:>8.0f} queries/s "
            f"{peak:>6.2f} GiB peak"
        )
        return
    print(
        f"{options.documents:,} documents, {options.queries:,} queries, {options.retriever}, "
        "imports included"
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_collection(directory, options.documents, options.queries)
        sizes = {
            file.name: f"{file.stat().st_size / 2**20:.0f} MiB" for file in directory.iterdir()
        }
        print(", ".join(f"{file} {size}" for file, size in sorted(sizes.items())))
        for run in ["rerank_fast", *(["sentence-transformers"] if options.peer else [])]:
            command = [
                sys.executable,
                "-m",
                "benchmarks.steps.mining",
                *sys.argv[1:],
                "--run",
                run,
                "--directory",
                name,
            ]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

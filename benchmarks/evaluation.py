"""Pairs a second of an evaluation with this package and with sentence-transformers, the same model
and lists.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --model my-reranker --data lists.jsonl

Without --data the lists are queries over the documentation of installed packages, without --model
the model is the demo's encoder with a fresh head. `first` is an evaluator's first call, which
tokenises; `again` is a later call, as every few hundred steps of training, for which this package
keeps the tokens. Rounds alternate between the two packages, medians are printed, and the scores and
metrics of both are compared. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tokenizer's threads are left on: both packages profit.

import numpy as np
import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

from rerank_fast import CrossEncoder
from rerank_fast.data import load_lists
from rerank_fast.data.docstrings import build_docstring_lists
from rerank_fast.demo import encoder_directory
from rerank_fast.evaluation import RerankingEvaluator

SEED = 12


def _lists(source: str | None, count: int) -> Dataset:
    lists = (
        load_lists(source)
        if source
        else build_docstring_lists(num_negatives=29, max_lists=2 * count, seed=SEED)[0]
    )
    # The peer refuses a list of one document and skips one without a relevant document.
    kept = [
        row for row in lists if len(row["docs"]) > 1 and any(label > 0 for label in row["labels"])
    ]
    # One order for both: the peer puts positives first, and finds relevant documents by their text.
    unique = [row for row in kept if len(set(row["docs"])) == len(row["docs"])]
    return Dataset.from_list(unique[:count])


def _samples(lists: Dataset) -> list[dict[str, Any]]:
    return [
        {
            "query": row["query"],
            "positive": [
                doc for doc, label in zip(row["docs"], row["labels"], strict=True) if label > 0
            ],
            "documents": row["docs"],
        }
        for row in lists
    ]


def _timed(function: Callable[[], dict[str, float]]) -> tuple[float, dict[str, float]]:
    started = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=None, help="reranker directory; the demo's encoder where left out"
    )
    parser.add_argument("--data", default=None, help="lists with labels of 0 and 1")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch_size", type=int, default=64, help="pairs per forward pass of the peer"
    )
    parser.add_argument("--max_length", type=int, default=256, help="longest pair in tokens")
    options = parser.parse_args()

    lists = _lists(options.data, options.queries)
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as directory:
        CrossEncoder(
            options.model or encoder_directory(), max_length=options.max_length
        ).save_pretrained(directory)
        model = CrossEncoder(directory)
        peer = PeerCrossEncoder(directory, max_length=options.max_length)
    theirs = CrossEncoderRerankingEvaluator(
        _samples(lists), batch_size=options.batch_size, always_rerank_positives=False
    )
    ours = RerankingEvaluator(lists)
    ours(model), theirs(peer)  # first allocations
    times: dict[str, list[float]] = {"peer": [], "first": [], "again": []}
    for _ in range(options.rounds):
        seconds, expected = _timed(lambda: theirs(peer))
        times["peer"].append(seconds)
        evaluator = RerankingEvaluator(lists)
        for name in ("first", "again"):
            seconds, got = _timed(lambda evaluator=evaluator: evaluator(model))
            times[name].append(seconds)

    pairs = ours.set.pairs
    lengths = model.tokenize(pairs).lengths
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    print(
        f"{time.strftime('%Y-%m-%d')}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, sentence-transformers {sentence_transformers.__version__}"
    )
    print(
        f"{len(lists)} queries, {len(pairs)} pairs of "
        f"{lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens, peer {options.batch_size} "
        "a forward"
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'':<24} {'pairs/s':>9} {'ratio':>7}")
    titles = {
        "peer": "sentence-transformers",
        "first": "rerank_fast, first",
        "again": "rerank_fast, again",
    }
    for name, title in titles.items():
        print(
            f"{title:<24} {len(pairs) / medians[name]:>9.1f} "
            f"{medians['peer'] / medians[name]:>6.2f}x"
        )
    peer_scores = peer.predict(
        pairs, batch_size=options.batch_size, activation_fn=torch.nn.Identity()
    )
    print(
        "largest difference of a score "
        f"{np.abs(ours.score(model) - np.asarray(peer_scores)).max():.1e}"
    )
    print(
        "largest difference of a metric "
        f"{max(abs(got[name] - expected[name]) for name in expected):.1e}"
    )


if __name__ == "__main__":
    main()

"""Pairs a second of an evaluation with this package and with sentence-transformers, the same model
and lists.

    python -m benchmarks.steps.evaluation
    python -m benchmarks.steps.evaluation --model my-reranker --data lists.jsonl

Without --data the lists are queries over the documentation of installed packages, without --model
the model is the demo's encoder with a fresh head. `first` is an evaluator's first call, which
tokenises; `again` is a later call, as every few hundred steps of training, for which this package
keeps the tokens. Rounds alternate between the two packages, medians are printed, and the scores and
metrics of both are compared. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

from benchmarks.arguments import add_rows, make_parser
from benchmarks.results import Row, Run
from benchmarks.timing import Interleaved
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


def main() -> None:
    parser = make_parser(__name__)
    add_rows(parser)
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
    model, peer = _models(options.model or encoder_directory(), options.max_length)
    theirs = CrossEncoderRerankingEvaluator(
        _samples(lists), batch_size=options.batch_size, always_rerank_positives=False
    )
    ours = RerankingEvaluator(lists)
    got: dict[str, dict[str, float]] = {}

    def first() -> None:
        nonlocal ours
        ours = RerankingEvaluator(lists)
        ours(model)

    def again() -> None:
        got["ours"] = ours(model)

    def peers() -> None:
        got["peer"] = theirs(peer)

    timed = Interleaved({"peer": peers, "first": first, "again": again})
    timed.warm_up()
    medians = timed.run(options.rounds)
    pairs = ours.set.pairs
    _report(options, len(lists), model.tokenize(pairs).lengths, medians)
    peer_scores = peer.predict(
        pairs, batch_size=options.batch_size, activation_fn=torch.nn.Identity()
    )
    print(
        "largest difference of a score "
        f"{np.abs(ours.score(model) - np.asarray(peer_scores)).max():.1e}"
    )
    print(
        "largest difference of a metric "
        f"{max(abs(got['ours'][name] - value) for name, value in got['peer'].items()):.1e}"
    )


def _models(directory: str, max_length: int) -> tuple[CrossEncoder, PeerCrossEncoder]:
    """Ours and theirs, of one set of weights: a fresh head is random."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as saved:
        CrossEncoder(directory, max_length=max_length).save_pretrained(saved)
        return CrossEncoder(saved), PeerCrossEncoder(saved, max_length=max_length)


def _report(
    options: argparse.Namespace,
    num_lists: int,
    lengths: np.ndarray,  # (pairs,) tokens
    medians: dict[str, float],  # seconds of all pairs
) -> None:
    """Print the rates, and add them to the rows' file where one was named."""
    print(Run.here("").describe())
    print(
        f"{num_lists} queries, {len(lengths)} pairs of "
        f"{lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens, "
        f"peer {options.batch_size} a forward"
    )
    print(f"{'':<24} {'pairs/s':>9} {'ratio':>7}")
    titles = {
        "peer": "sentence-transformers",
        "first": "rerank_fast, first",
        "again": "rerank_fast, again",
    }
    for name, title in titles.items():
        print(
            f"{title:<24} {len(lengths) / medians[name]:>9.1f} "
            f"{medians['peer'] / medians[name]:>6.2f}x"
        )
    texts = f"{num_lists} lists, {len(lengths)} pairs of {lengths.min()}-{lengths.max()} tokens"
    peer_rate = len(lengths) / medians["peer"]
    rows = [
        Row(
            "steps/evaluation",
            f"{name}, {texts}",
            peer_rate,
            len(lengths) / medians[name],
            "pairs/s",
        )
        for name in ("first", "again")
    ]
    Run.of_script(options.rows, "benchmarks.steps.evaluation", rows)


if __name__ == "__main__":
    main()

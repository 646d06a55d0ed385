"""Time and memory of text to tokens: one pair of long texts, then pairs of ordinary length.

    python -m benchmarks.steps.tokenization

Beside the tokenizer's own truncation of pairs, which also makes all that it cuts off; it is left
out where that would be above --peer_gib. Every row of long texts is a process of its own: its peak
is the resident set's, less what is resident before the pair comes. Ordinary pairs are 1,000 of
about 90 tokens, each query beside ten documents; medians of alternating rounds. The demo's
tokenizer, pairs cut to 512 tokens. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from transformers import AutoTokenizer

from benchmarks.arguments import make_parser
from benchmarks.timing import Interleaved
from benchmarks.workload import words_like_marco
from rerank_fast.demo import encoder_directory
from rerank_fast.model.texts import Pair
from rerank_fast.model.tokens.tokenization import PairTokenizer

MAX_LENGTH = 512
WORDS = [
    (20, 2_000),
    (200, 2_000),
    (2_000, 20_000),
    (20_000, 20_000),
    (20_000, 200_000),
    (200_000, 200_000),
]


def _peer_gib(query: int, document: int) -> float:
    """Of each piece of one text beside each of the other's, 700 bytes a token or word."""
    pieces = query * document / (MAX_LENGTH / 2) ** 2
    return pieces * MAX_LENGTH * 700 / 2**30


def _ways() -> dict[str, Callable[[list[Pair]], object]]:
    tokenizer = AutoTokenizer.from_pretrained(encoder_directory())
    ours = PairTokenizer(AutoTokenizer.from_pretrained(encoder_directory()))
    return {
        "transformers": lambda pairs: tokenizer(
            *map(list, zip(*pairs, strict=True)), truncation="longest_first", max_length=MAX_LENGTH
        ),
        "rerank_fast": lambda pairs: ours(pairs, MAX_LENGTH),
    }


def _long_pair(way: str, query: int, document: int) -> None:
    """Print the seconds and the MiB of one pair of these numbers of words."""
    generator = np.random.default_rng(0)
    tokenize = _ways()[way]
    tokenize([("rain", "sea")])
    pair = words_like_marco(generator, query), words_like_marco(generator, document)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    tokenize([pair])
    seconds = time.perf_counter() - started
    print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _row(way: str, query: int, document: int, limit: float) -> str:
    if way == "transformers" and _peer_gib(query, document) > limit:
        return f"{'-':>10} {'-':>10}"
    words = str(query), str(document)
    command = [sys.executable, "-m", "benchmarks.steps.tokenization", "--row", way, *words]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, mib = map(float, printed.split())
    return f"{seconds * 1e3:>10,.1f} {mib:>10,.0f}"


def _ordinary(rounds: int) -> None:
    generator = np.random.default_rng(0)
    queries = [words_like_marco(generator, 6) for _ in range(100)]
    pairs = [(query, words_like_marco(generator)) for query in queries for _ in range(10)]
    ways = _ways()
    calls = {way: partial(tokenize, pairs) for way, tokenize in ways.items()}
    medians = Interleaved(calls).run(rounds)
    print("\n1,000 ordinary pairs")
    for way, median in medians.items():
        print(f"{way:<20} {median * 1e3:>10.0f} ms {medians['transformers'] / median:>6.2f}x")


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument(
        "--peer_gib",
        type=float,
        default=4,
        help="most memory for the tokenizer's own truncation",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        way, query, document = options.row
        _long_pair(way, int(query), int(document))
        return
    ways = ("transformers", "rerank_fast")
    print(f"{'words':<20}" + "".join(f" {way + ' ms':>15} {'MiB':>5}" for way in ways))
    for query, document in WORDS:
        rows = [_row(way, query, document, options.peer_gib) for way in ways]
        print(f"{f'{query:,} x {document:,}':<20}" + " ".join(rows), flush=True)
    _ordinary(options.rounds)


if __name__ == "__main__":
    main()

"""A process that scores pairs of ever new lengths: python -m tests.model.growing_run DIRECTORY
DTYPE [padded].

Prints by how many MiB it has grown after its first calls.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from rerank_fast.model import preparation
from rerank_fast.model.cross_encoder import CrossEncoder

FIRST_CALLS, CALLS = 100, 100


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(directory: str, dtype: str, path: str = "packed") -> None:
    if path == "padded":
        preparation.find_packed = lambda *_: None
    model = CrossEncoder(directory, dtype=dtype)
    draw = random.Random(0)
    first = 0.0
    for call in range(FIRST_CALLS + CALLS):
        if call == FIRST_CALLS:
            first = resident_mib()
        texts = [" ".join(["panda"] * draw.randrange(1, 60)) for _ in range(draw.randrange(1, 10))]
        model.predict([("sea", text) for text in texts])
    print(resident_mib() - first)


if __name__ == "__main__":
    main(*sys.argv[1:])

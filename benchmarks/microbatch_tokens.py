"""Seconds of a training step, or of scoring, by the tokens of a micro-batch.

    python -m benchmarks.microbatch_tokens --precision bf16 --budgets 1024 4096 16384

One budget after the other in every round, so that whatever else slows the machine slows all alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.workload import encoder, marco_like_lists
from rerank_fast import Trainer, TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=None, help="encoder; the demo extra's all-MiniLM-L6-v2 where left out"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--gradient_cache", choices=("on", "off"), default="off")
    parser.add_argument("--lists", type=int, default=16, help="of 3-10 documents")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument(
        "--score", action="store_true", help="time scoring without gradients instead of a step"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    model, lists = options.model or encoder(), marco_like_lists(options.lists)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model,
            lists,
            config=TrainingConfig(
                output=output,
                batch_size=options.lists,
                max_length=options.max_length,
                precision=options.precision,
                gradient_cache=options.gradient_cache,
                show_progress_bar=False,
            ),
        )
        batch = next(trainer.batches())

        def step(budget: int) -> None:
            trainer.backward.max_tokens = budget
            trainer.step(batch)

        @torch.inference_mode()
        def score(budget: int) -> None:
            dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
            score(trainer.model.prepare(batch.lists.pairs, dtype=dtype), max_tokens=budget)

        timed: Callable[[int], None] = score if options.score else step
        trainer.model.train(not options.score)
        seconds: dict[int, list[float]] = {budget: [] for budget in options.budgets}
        timed(options.budgets[0])  # first allocations
        for _ in range(options.rounds):
            for budget, times in seconds.items():
                started = time.perf_counter()
                timed(budget)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
    lengths = batch.lists.pairs.lengths
    shape = (
        f"{len(lengths)} pairs of {lengths.min()}-{lengths.max()} tokens, {lengths.sum()} in all"
    )
    print(f"{shape}; {options.precision}, {torch.get_num_threads()} threads")
    for budget, times in seconds.items():
        print(
            f"{budget:>7} tokens: {statistics.median(times):.3f} s (fastest {min(times):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()

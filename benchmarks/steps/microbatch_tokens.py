"""Seconds of a training step, or of scoring, by the tokens of a micro-batch.

    python -m benchmarks.steps.microbatch_tokens --precision bf16 --budgets 1024 4096 16384

One budget after the other in every round, so that whatever else slows the machine slows all alike.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch

from benchmarks.arguments import make_parser
from benchmarks.steps.training import make_step
from benchmarks.timing import Interleaved
from benchmarks.workload import marco_like_lists
from rerank_fast import score


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument(
        "--model", default=None, help="encoder; the demo extra's all-MiniLM-L6-v2 where left out"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--gradient_cache", choices=("on", "off"), default="off")
    parser.add_argument("--lists", type=int, default=16, help="of 3-10 documents")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument(
        "--score", action="store_true", help="time scoring without gradients instead of a step"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    settings = {"precision": options.precision, "gradient_cache": options.gradient_cache}
    with tempfile.TemporaryDirectory() as output:
        step = make_step(
            marco_like_lists(options.lists),
            output,
            model=options.model,
            max_length=options.max_length,
            **settings,
        )
        trainer = step.trainer
        pairs = next(trainer.batches()).lists.pairs

        def train(budget: int) -> None:
            trainer.backward.max_tokens = budget
            step.run()

        @torch.inference_mode()
        def predict(budget: int) -> None:
            score(trainer.model.prepare(pairs, dtype=step.dtype), max_tokens=budget)

        trainer.model.train(not options.score)
        timed = predict if options.score else train
        calls = {f"{budget:>7} tokens": partial(timed, budget) for budget in options.budgets}
        rounds = Interleaved(calls)
        rounds.warm_up()
        medians = rounds.run(options.rounds)
    precision = trainer.config.precision
    print(f"{step.describe}; {precision}, {torch.get_num_threads()} threads")
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} s (fastest {min(rounds.seconds[name]):.3f})", flush=True)


if __name__ == "__main__":
    main()

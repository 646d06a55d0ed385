"""Time of the CPU LambdaLoss, forward and backward, by the number of preference pairs: a table, its
slope, a plot.

    python -m benchmarks.tools.plot_lambda_loss --output lambda_loss.png
"""

from __future__ import annotations

import math
import statistics

import torch

from benchmarks.arguments import make_parser
from benchmarks.timing import Interleaved
from rerank_fast import lambda_loss
from rerank_fast.ops.lambda_loss import count_pairs

SIZES = [10, 30, 100, 300, 1000, 3000, 10_000]
DOCUMENTS_PER_CALL = 10_000  # so that no call is all overhead


def measure(size: int, kind: str) -> tuple[int, float]:
    """Preference pairs of a call, and its median seconds of 15; all calls hold about as many
    documents.
    """
    generator = torch.Generator().manual_seed(0)
    num_lists = max(1, DOCUMENTS_PER_CALL // size)
    documents = num_lists * size
    scores = torch.randn(documents, generator=generator).requires_grad_()
    if kind == "graded":
        labels = torch.randint(0, 5, (documents,), generator=generator).float()
    else:
        labels = (torch.rand(documents, generator=generator) < 0.15).float()
    offsets = torch.arange(num_lists + 1) * size

    def call() -> None:
        scores.grad = None
        lambda_loss(scores, labels, offsets).backward()

    timed = Interleaved({"ours": call})
    timed.warm_up()
    return int(count_pairs(scores, labels, offsets)), timed.run(15)["ours"]


def slope(points: list[tuple[int, float]]) -> float:
    """Of log seconds over log pairs, by least squares: 1 is linear."""
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument("--output", help="file of the plot; none without")
    output = parser.parse_args().output
    print(f"{torch.get_num_threads()} threads")
    print(f"{'labels':<8} {'documents':>9} {'pairs':>12} {'ms':>9} {'ns a pair':>10}")
    curves = {}
    for kind in ("binary", "graded"):
        curves[kind] = [measure(size, kind) for size in SIZES]
        for size, (pairs, seconds) in zip(SIZES, curves[kind], strict=True):
            print(
                f"{kind:<8} {size:>9} {pairs:>12} {seconds * 1e3:>9.3f} "
                f"{seconds / pairs * 1e9:>10.3f}"
            )
        print(
            f"{kind:<8} slope of log time over log pairs from 300 documents on: "
            f"{slope(curves[kind][3:]):.3f}"
        )
    if output is None:
        return
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'rerank-fast[bench]'") from error
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, points in curves.items():
        axes.loglog(
            *zip(*points, strict=True), marker="o", label=f"{kind}, slope {slope(points[3:]):.2f}"
        )
    axes.set(
        xlabel="preference pairs",
        ylabel="seconds, forward and backward",
        title="LambdaLoss, 10 to 10,000 documents",
    )
    axes.legend()
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    main()

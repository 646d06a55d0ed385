"""Where the time of one small LambdaLoss call goes, layer by layer, in microseconds.

    python -m benchmarks.tools.profile_loss --lists 16 --documents 10

A line with a plus does the work of the line above it and some more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.arguments import make_parser
from benchmarks.timing import Interleaved
from rerank_fast.ops import cpu
from rerank_fast.ops import lambda_loss as op
from rerank_fast.ops.cpu import lists as cpu_lists

OPTIONS = ("ndcg2pp", 0, 1.0, 10.0, 1e-10, "binary", "pairs", "cpu")
NAMES = ("scheme", "k", "sigma", "mu", "eps", "reduction_log", "reduction")


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument("--lists", type=int, default=16)
    parser.add_argument("--documents", type=int, default=10)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    documents = arguments.lists * arguments.documents
    scores = torch.randn(documents, generator=generator).requires_grad_()
    labels = (torch.rand(documents, generator=generator) < 0.15).float()
    offsets = torch.arange(arguments.lists + 1) * arguments.documents
    plain = scores.detach()
    named = dict(zip(NAMES, OPTIONS[:-1], strict=True))

    class Nothing(torch.autograd.Function):
        """A function that computes nothing: autograd's own share."""

        @staticmethod
        def forward(ctx, scores: Tensor, labels: Tensor, offsets: Tensor, options: tuple) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(plain)
            return torch.empty(())

        @staticmethod
        def backward(ctx, grad_loss: Tensor):  # type: ignore[no-untyped-def]
            return ctx.saved_tensors[0], None, None, None

    def backward(loss: Tensor) -> None:
        scores.grad = None
        loss.backward()

    address = plain.data_ptr(), labels.data_ptr(), offsets.data_ptr(), documents
    loss, grad = torch.empty(()), torch.empty(documents)
    counted = torch.empty((), dtype=torch.int64)
    options = cpu_lists.lambda_loss_options(*OPTIONS[:-1], torch.get_num_threads())
    outputs = loss.data_ptr(), grad.data_ptr(), counted.data_ptr()
    layers: dict[str, Callable[[], object]] = {
        "the kernel, called with addresses": lambda: cpu.compiled().lambda_loss_float(
            options, *address, arguments.lists, *outputs
        ),
        "+ allocation of the outputs, conversions (cpu_lists.lambda_loss_forward)": lambda: (
            cpu_lists.lambda_loss_forward(plain, labels, offsets, **named)
        ),
        "+ the dispatcher (tracing only)": lambda: torch.ops.rerank_fast.lambda_loss.default(
            plain, labels, offsets, *OPTIONS
        ),
        "cpu_lists.lambda_loss_forward + autograd.Function": lambda: op._LambdaLoss.apply(
            scores, labels, offsets, OPTIONS, False
        ),
        "+ checks (lambda_loss)": lambda: op.lambda_loss(scores, labels, offsets),
        "+ backward: the whole": lambda: backward(op.lambda_loss(scores, labels, offsets)),
        "a function that computes nothing, forward and backward": lambda: backward(
            Nothing.apply(scores, labels, offsets, OPTIONS)
        ),
        "scores.sum(), forward and backward": lambda: backward(scores.sum()),
    }
    timed = Interleaved(layers, repeats=50)
    timed.warm_up()
    medians = timed.run(100)
    print(f"{arguments.lists} lists of {arguments.documents}, {torch.get_num_threads()} threads")
    print("median of 100 means of 50 calls, µs")
    for name, seconds in medians.items():
        print(f"{seconds * 1e6:8.1f}  {name}")


if __name__ == "__main__":
    main()

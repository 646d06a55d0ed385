"""LambdaLoss in Triton: the long lists' order, pairs, and the mean; at most three launches,
whatever the lists.

A batch of up to SMALL_BATCH documents takes two: one for ranks, ideal DCG, gains, weights, losses
and gradients, and one for the mean. A larger batch, or one whose lists have more than SHORT_LIST
documents in the mean, takes three: the first puts the lists of more than SHORT_LIST documents in
order, and is launched whether there are any or not, for only the device knows the lists. Backward
is one launch.

The kernels of the first two are in lambda_loss_order.py and lambda_loss_pairs.py; here are the
mean's, the backward's, and the launchers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.choices import Scheme
from rerank_fast.ops.triton import autotune, guard, launcher
from rerank_fast.ops.triton.grid import cdiv
from rerank_fast.ops.triton.lambda_loss_order import lists_of, order_kernel
from rerank_fast.ops.triton.lambda_loss_pairs import pair_kernel
from rerank_fast.ops.triton.variant import Variant

# In a batch of at most SMALL_BATCH documents each block puts its lists in order itself, in a larger
# one, or where its lists have more than SHORT_LIST in the mean, those of at most SHORT_LIST. Longer
# ones are ordered by a launch before: that costs less than once in each of their blocks. Which
# lists are long is decided on the device: the host knows N and Q alone.
SMALL_BATCH, SHORT_LIST = 1024, 256
# 16 warps on 32 x 32 pairs are 2 pairs a thread: with 4 the row state alone fills 64 registers,
# half the occupancy.
PAIRS = launcher.Config(
    guard.for_vendor(
        {"BLOCK": 32, "TILE": 32, "num_warps": 16, "maxnreg": 64, "enable_fp_fusion": True}
    )
)
# 1 pair a thread: what fp64 holds then fits 80 registers; by itself ptxas would take 64 and spill.
PAIRS_FP64 = launcher.Config(
    guard.for_vendor(
        {"BLOCK": 8, "TILE": 32, "num_warps": 8, "maxnreg": 80, "enable_fp_fusion": True}
    )
)
PAIRS_CASE = ("SCHEME", "PER_SLOT", "ORDERED")
# What tuning tries beside them. BLOCK stays: buffers are of its size.
PAIRS_AROUND: tuple[dict[str, Any], ...] = (
    {"num_warps": 8},
    {"TILE": 64},
    {"TILE": 64, "num_warps": 8},
)
# What the loss's specification takes for divergence.
LARGEST_SCORE = 2.0**64
FINISH = launcher.Config({"BLOCK": 1024, "num_warps": 8, "enable_fp_fusion": True})


@triton.jit(do_not_specialize=["num_blocks", "n"])
def mean_kernel(
    loss,  # (num_blocks,) compute dtype
    pairs,  # (num_blocks,) int64, or AT_FAULT
    grad,  # in and out (N,) compute dtype
    total,  # out () compute dtype
    num_pairs,  # out () int64
    num_blocks,
    n,
    OVER_PAIRS: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of the batch; with OVER_PAIRS it and the gradient are divided by the number of
    pairs.

    All NaN where the offsets are at fault.
    """
    loss_sum = tl.zeros([BLOCK], dtype)
    pair_sum = tl.zeros([BLOCK], tl.int64)
    fewest = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        loss_sum += tl.load(loss + block, mask=block < num_blocks, other=0.0)
        visited = tl.load(pairs + block, mask=block < num_blocks, other=0)
        fewest = tl.minimum(fewest, visited)
        pair_sum += visited
    at_fault = tl.min(fewest, axis=0) < 0
    divisor = tl.full([], 1.0, dtype)
    if OVER_PAIRS:
        divisor = tl.maximum(tl.sum(pair_sum, axis=0), 1).to(dtype)
        divisor = tl.where(at_fault, float("nan"), divisor)
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(grad + i, tl.load(grad + i, mask=i < n, other=0.0) / divisor, mask=i < n)
    elif at_fault:
        divisor = tl.full([], float("nan"), dtype)
        _fill_with_nan(grad, n, dtype, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(total, tl.sum(loss_sum, axis=0) / divisor)
        tl.store(num_pairs, tl.sum(pair_sum, axis=0))


@triton.jit
def _fill_with_nan(grad, n, dtype: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(grad + i, tl.full([BLOCK], float("nan"), dtype), mask=i < n)


@triton.jit(do_not_specialize=["num_blocks", "n"])
def list_sum_kernel(
    loss,  # (N,) compute dtype
    pairs,  # (num_blocks,) int64, or AT_FAULT
    offsets,  # (Q + 1,) int64
    grad,  # in and out (N,) compute dtype
    list_loss,  # out (Q,) compute dtype
    num_pairs,  # out () int64
    num_blocks,
    n,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each list's sum of its slots' terms; NaN, with all gradients, where the offsets are at
    fault.
    """
    pair_sum = tl.zeros([BLOCK], tl.int64)
    fewest = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        visited = tl.load(pairs + block, mask=block < num_blocks, other=0)
        fewest = tl.minimum(fewest, visited)
        pair_sum += visited
    if tl.program_id(0) == 0:
        tl.store(num_pairs, tl.sum(pair_sum, axis=0))
    if tl.min(fewest, axis=0) < 0:
        tl.store(list_loss + tl.program_id(0), tl.full([], float("nan"), dtype))
        if tl.program_id(0) == 0:
            _fill_with_nan(grad, n, dtype, BLOCK)
        return
    start = tl.load(offsets + tl.program_id(0))
    size = (tl.load(offsets + tl.program_id(0) + 1) - start).to(tl.int32)
    total = tl.zeros([BLOCK], dtype)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(loss + start + i, mask=i < size, other=0.0)
    tl.store(list_loss + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["num_lists", "list_steps", "n"])
def backward_kernel(
    grad,  # (N,) compute dtype
    grad_loss,  # () or, with PER_LIST, (Q,)
    offsets,  # (Q + 1,) int64
    grad_scores,  # out (N,)
    num_lists,
    list_steps,
    n,
    PER_LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < n
    if PER_LIST:
        own_list, _, _ = lists_of(offsets, i, in_i, num_lists, list_steps, n)
        upstream = tl.load(grad_loss + own_list)
    else:
        upstream = tl.load(grad_loss)
    product = tl.load(grad + i, mask=in_i, other=0.0) * upstream
    # Rounded after the product: a loss scale reaches fp16 gradients first.
    tl.store(grad_scores + i, product.to(grad_scores.dtype.element_ty), mask=in_i)


def launch_config(wide: bool) -> launcher.Config:
    """Constants and launch options of order_kernel and pair_kernel; wide for fp64."""
    return PAIRS_FP64 if wide else PAIRS


def forward(
    scores: Tensor,  # (N,)
    labels: Tensor,  # (N,)
    offsets: Tensor,  # (Q + 1,) int64
    *,
    scheme: str,
    k: int,
    sigma: float,
    mu: float,
    eps: float,
    reduction_log: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backend contract: the loss, () or (Q,), dL/dscores (N,), and the number of pairs, ()
    int64.

    Loss and gradient are in fp32 or, for fp64 scores, fp64. Nothing is read on the host: grids and
    kernels follow from the shapes alone. Raises ValueError for CPU tensors outside Triton's
    interpreter.
    """
    guard.require_gpu(scores)
    if offsets.is_cpu:
        ragged.check_offsets(offsets, scores.shape[0])
    compute_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dtype: Any = tl.float64 if compute_dtype == torch.float64 else tl.float32
    n, num_lists = scores.shape[0], offsets.shape[0] - 1
    per_list = reduction == "none"
    if n == 0:
        loss = scores.new_zeros((num_lists,) if per_list else (), dtype=compute_dtype)
        return loss, scores.to(compute_dtype), offsets.new_zeros(())

    launch = launch_config(compute_dtype == torch.float64)
    # In the mean, which is all that the host knows of the lists' sizes.
    has_long = n > SMALL_BATCH or n > SHORT_LIST * num_lists
    longest = SHORT_LIST if has_long else SMALL_BATCH
    ordered = n > longest
    num_blocks = cdiv(n, launch["BLOCK"])
    stride = cdiv(n, 64) * 64  # rows aligned whatever n: one compiled kernel
    device = scores.device
    slots = torch.empty((5, stride), dtype=compute_dtype, device=device)
    ranks = torch.empty(stride, dtype=torch.int32, device=device)
    places = torch.empty(stride, dtype=torch.int64, device=device)
    loss = torch.empty(n if per_list else num_blocks, dtype=compute_dtype, device=device)
    pairs = torch.empty(num_blocks, dtype=torch.int64, device=device)
    grad = torch.empty(n, dtype=compute_dtype, device=device)
    total = torch.empty((num_lists,) if per_list else (), dtype=compute_dtype, device=device)
    num_pairs = torch.empty((), dtype=torch.int64, device=device)
    list_steps = (num_lists - 1).bit_length()
    largest_score = LARGEST_SCORE / max(sigma, 1.0)
    scale = (1 / math.log(2) if reduction_log == "binary" else 1.0) / (
        num_lists if reduction == "lists" else 1
    )
    in_dtype = launcher.constants(dtype=dtype)
    documents = (scores, labels, offsets, slots, ranks, places)
    if ordered:
        lists = (stride, longest + 1, num_lists, list_steps, n, largest_score)
        launcher.launch(order_kernel, (num_blocks,), documents, lists, in_dtype, launch)
    kernel, pairs_launch = autotune.choose(pair_kernel, launch, PAIRS_AROUND, PAIRS_CASE)
    launcher.launch(
        kernel,
        (num_blocks,),
        (*documents, loss, pairs, grad),
        (
            stride,
            min(k or n, n),  # no cut is a cut after the last rank
            sigma / math.log(2),
            mu,
            eps,
            math.log(2) * scale,
            -sigma * scale,
            largest_score,
            longest,
            num_lists,
            list_steps,
            n.bit_length(),
            n,
        ),
        launcher.constants(SCHEME=scheme, PER_SLOT=per_list, ORDERED=ordered, dtype=dtype),
        pairs_launch,
    )
    if per_list:
        tensors = (loss, pairs, offsets, grad, total, num_pairs)
        numbers = num_blocks, n
        launcher.launch(list_sum_kernel, (num_lists,), tensors, numbers, in_dtype, FINISH)
    else:
        over_pairs = reduction == "pairs"
        launcher.launch(
            mean_kernel,
            (cdiv(n, FINISH["BLOCK"]) if over_pairs else 1,),
            (loss, pairs, grad, total, num_pairs),
            (num_blocks, n),
            launcher.constants(OVER_PAIRS=over_pairs, dtype=dtype),
            FINISH,
        )
    return total, grad, num_pairs


def backward(
    grad: Tensor,  # (N,)
    grad_loss: Tensor,  # () or (Q,)
    offsets: Tensor,  # (Q + 1,) int64
    dtype: torch.dtype,
) -> Tensor:
    """dL/dscores (N,) in dtype, from forward's gradient and the loss's own, in one launch."""
    guard.require_gpu(grad)
    n, num_lists = grad.shape[0], offsets.shape[0] - 1
    grad_scores = torch.empty(n, dtype=dtype, device=grad.device)
    if n:
        launcher.launch(
            backward_kernel,
            (cdiv(n, FINISH["BLOCK"]),),
            (grad, grad_loss, offsets, grad_scores),
            (num_lists, (num_lists - 1).bit_length(), n),
            launcher.constants(PER_LIST=grad_loss.dim() == 1),
            FINISH,
        )
    return grad_scores


def shipped() -> Iterator[Variant]:
    scalars = [
        "k",
        "num_lists",
        "num_steps",
        "list_steps",
        "slot_steps",
        "num_blocks",
        "n",
        "stride",
    ]
    fixed = dict.fromkeys([*scalars, "shortest", "longest"], "i32")
    fixed |= dict.fromkeys(
        ["slope", "mu", "eps", "loss_scale", "pull_scale", "largest_score"], "fp64"
    )
    fixed |= {
        "offsets": "*i64",
        "pairs": "*i64",
        "num_pairs": "*i64",
        "ranks": "*i32",
        "places": "*i64",
    }

    def variant(kernel: Any, scores: str, config: dict[str, Any], **constants: Any) -> Variant:
        wide = scores == "fp64"
        name = "-".join(
            [kernel.__name__, scores, *(f"{key}={value}" for key, value in constants.items())]
        )
        types = dict.fromkeys(kernel.arg_names, "*fp64" if wide else "*fp32") | fixed
        types |= {"scores": f"*{scores}", "grad_scores": f"*{scores}"}
        if "dtype" in kernel.arg_names:
            constants["dtype"] = tl.float64 if wide else tl.float32
        visits = {}
        if (
            kernel is pair_kernel and not wide
        ):  # an exponential a pair, which ptxas may take twice, and a reciprocal
            visits = {
                "items": config["BLOCK"] * config["TILE"],
                "anchor": "MUFU.EX2",
                "unit": "MUFU.RCP",
            }
        return Variant(name, kernel, types, config, constants, **visits)

    for scores in ("fp32", "fp64", "bf16", "fp16"):
        config = launch_config(scores == "fp64")
        yield variant(order_kernel, scores, config)
        # The half precisions differ in one load: one scheme shows it.
        for scheme in get_args(Scheme) if scores in ("fp32", "fp64") else ["ndcg2pp"]:
            for per_slot, ordered in [(False, True), (True, True), (False, False)][
                : 3 if scheme == "ndcg2pp" else 1
            ]:
                options = {"SCHEME": scheme, "PER_SLOT": per_slot, "ORDERED": ordered}
                yield variant(pair_kernel, scores, config, **options)
        yield variant(backward_kernel, scores, FINISH, PER_LIST=True)
        if scores in ("fp32", "fp64"):
            yield variant(mean_kernel, scores, FINISH, OVER_PAIRS=True)
            yield variant(list_sum_kernel, scores, FINISH)

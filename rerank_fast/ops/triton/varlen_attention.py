"""Attention over packed sequences in Triton: one launch, whatever the lengths.

The gradients are in varlen_attention_backward.py.

Scores live in tiles; the softmax runs along with them and backward computes them again from each
query's logarithm of its sum (FlashAttention, Dao et al. 2022). A block of queries, or of keys,
belongs to one program, which sums what it owns in a fixed order: no atomics, the same bits every
time. Nothing is read on the host: sequence n takes its blocks from place cu_seqlens[n] // BLOCK + n
on, so that tokens // BLOCK + N programs suffice for any lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_fast.ops import ragged
from rerank_fast.ops.triton import autotune, dropout, guard, launcher
from rerank_fast.ops.triton.grid import next_power_of_2
from rerank_fast.ops.triton.variant import Variant

MAX_HEAD_SIZE = 256
# The results, and the gradients of queries, and of keys and values.
Part = Literal["forward", "queries", "keys"]
# Of fp32 parts and widths for which ptxas would, on sm_80, 86 or 120, rather spill than take what
# there is.
_REGISTERS: dict[tuple[Part, int], int] = {("forward", 64): 64, ("keys", 256): 128}
# The same where scores are capped, by the bytes of a value too.
_CAPPED_REGISTERS: dict[tuple[Part, int, int], int] = {
    ("forward", 256, 2): 255,
    ("forward", 256, 4): 128,
    ("queries", 64, 2): 168,
    ("queries", 128, 4): 128,
    ("keys", 64, 2): 128,
    ("keys", 64, 4): 128,
    ("keys", 128, 2): 255,
    ("keys", 128, 4): 128,
}


@functools.cache
def launch(
    head_size: int,
    dtype: torch.dtype,
    part: Part,
    *,
    few_queries: bool,
    capped: bool = False,
    hip: bool = guard.HIP,
) -> launcher.Config:
    """The one configuration of a case: tiles that stay in registers and shared memory, from sm_80
    to gfx942.

    A program holds its tiles in registers, which is what bounds the occupancy: 12 to 50 %, as flash
    attention's
    kernels run. More of it takes smaller tiles, and those more instructions: with 16 keys for 32,
    1.6 times as many a score. More warps on the same rows, 8 on 64, compute every score twice.
    """
    width = max(16, next_power_of_2(head_size))
    warps, stages = (
        8 if width > {"forward": MAX_HEAD_SIZE, "queries": 64, "keys": 32}[part] else 4,
        2,
    )
    if (
        dtype == torch.float32
    ):  # exact products go through the FMA units: a thread holds all of its tile
        own = 32 if width <= 32 else 16
        rows, keys = (16, own) if part == "keys" else (own, 16)
        warps = 16 if part == "queries" and width > 128 else 8
        stages = 2 if part == "queries" or width <= 128 else 1
    elif width <= 64:
        rows, keys = (32, 64) if part == "keys" and width <= 32 else (64, 32)
        if capped and part == "keys":  # the slopes of 64 queries' scores would spill
            rows = 32
    elif width <= 128:
        rows, keys = 64 if part == "forward" else 32, 32
    else:
        rows = keys = 32 if part == "forward" and not few_queries else 16
    if few_queries:
        rows = 16
    if hip:  # a warp has 64 threads, and what a second stage holds would spill
        warps, stages = 4, 1
    blocks = {"BLOCK_M": rows, "BLOCK_N": keys, "WIDTH": width}
    config = blocks | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    registers = _REGISTERS.get((part, width)) if dtype == torch.float32 else None
    if capped:
        registers = _CAPPED_REGISTERS.get((part, width, dtype.itemsize), registers)
    if registers is not None:
        config["maxnreg"] = registers
    return launcher.Config(guard.for_vendor(config, hip))


def around(config: dict[str, Any], part: Part) -> tuple[dict[str, Any], ...]:
    """What tuning tries beside a config. Queries' programs keep their rows: sums of their gradients
    lie by them.
    """
    tried: tuple[dict[str, Any], ...] = (
        {"num_stages": 1},
        {"num_stages": 3},
        {"num_warps": 4 if config["num_warps"] == 8 else 8},
    )
    return (
        tried if part == "queries" else (*tried, {"BLOCK_M": 2 * config["BLOCK_M"], "num_warps": 8})
    )


def choose(kernel: Any, config: launcher.Config, part: Part) -> tuple[Any, launcher.Config]:
    """What to launch, and with which config; see autotune.choose."""
    if not autotune.ENABLED:
        return kernel, config
    return autotune.choose(kernel, config, around(config, part), CASE)


@triton.jit
def block_of(
    own,  # (N + 1,) cumulative lengths of the side that the program owns a block of
    other,  # and those of the other side
    before,  # how far back from its own place a token meets the other side's, and how far on
    after,
    num_sequences,
    num_steps,
    num_own,  # tokens of either side
    num_other,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The block of program 0's axis: its first row in its sequence, and of either side length and
    first token.

    Then the range of the other side's rows that the block's may meet; places are counted from the
    sequences' ends. Last whether the sequence lies in the tokens of either side. Where it does not,
    the other side's numbers are not to be used, and its own are of what of it lies there; the first
    and the last sequence then reach to the ends.
    """
    block = tl.program_id(0)
    low = block * 0
    high = low + num_sequences - 1
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        begins = tl.load(own + middle) // BLOCK + middle <= block
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    token = tl.load(own + low)
    end_token = tl.load(own + low + 1)
    other_token = tl.load(other + low)
    other_end_token = tl.load(other + low + 1)
    fits = (token >= 0) & (token <= end_token) & (end_token <= num_own)
    fits = (
        fits
        & (other_token >= 0)
        & (other_token <= other_end_token)
        & (other_end_token <= num_other)
    )
    is_first = low == 0
    is_last = low == num_sequences - 1
    fits = fits & ((is_first == 0) | ((token == 0) & (other_token == 0)))
    fits = fits & ((is_last == 0) | ((end_token == num_own) & (other_end_token == num_other)))
    if fits == 0:
        token = tl.where(is_first, 0, tl.minimum(tl.maximum(token, 0), num_own))
        end_token = tl.where(is_last, num_own, tl.minimum(end_token, num_own))
    size = end_token - token
    first = tl.maximum(block - token // BLOCK - low, 0) * BLOCK
    other_size = other_end_token - other_token
    shift = other_size - size
    begin = first * 0
    end = other_size
    if HAS_BEFORE:
        begin = tl.maximum(begin, first + shift - before)
    if HAS_AFTER:
        end = tl.minimum(end, tl.minimum(first + BLOCK, size) + shift + after)
    return first, size, token, other_size, other_token, begin, end, fits


@triton.jit
def _places(
    token_stride, head_stride, head, token, in_rows, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Where a (BLOCK, WIDTH) tile of one head begins, its elements from there, and which of them
    there are.
    """
    start = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    # A tile's own places fit 32 bits.
    places = tl.arange(0, in_rows.shape[0])[:, None] * token_stride + tl.arange(0, WIDTH)[None, :]
    there = in_rows[:, None]
    if HEAD_SIZE != WIDTH:
        there = there & (tl.arange(0, WIDTH) < HEAD_SIZE)[None, :]
    return start, places, there


@triton.jit
def load_tile(
    tensor,
    token_stride,
    head_stride,
    head,
    token,  # the tile's first
    in_rows,  # (BLOCK,)
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A (BLOCK, WIDTH) tile of one head; 0 where nothing is."""
    start, places, there = _places(
        token_stride, head_stride, head, token, in_rows, HEAD_SIZE, WIDTH
    )
    return tl.load(tensor + start + places, mask=there, other=0.0)


@triton.jit
def store_tile(
    tensor,
    tile,
    token_stride,
    head_stride,
    head,
    token,
    in_rows,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    start, places, there = _places(
        token_stride, head_stride, head, token, in_rows, HEAD_SIZE, WIDTH
    )
    tl.store(tensor + start + places, tile.to(tensor.dtype.element_ty), mask=there)


@triton.jit
def reads(
    place,  # of the queries, counted as the keys
    j,
    num_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Which queries read which keys: shapes that broadcast to the tile's."""
    allowed = j < num_k
    if HAS_LEFT:
        allowed = allowed & (j >= place - window_left)
    if HAS_RIGHT:
        allowed = allowed & (j <= place + window_right)
    return allowed


@triton.jit
def share_of_cap(scores, SOFTCAP: tl.constexpr):
    """tanh(s / SOFTCAP) of scores s times log2(e), to 3e-7."""
    x = scores * (0.6931471805599453 / SOFTCAP)
    a = tl.abs(x)
    a2 = a * a
    t = tl.exp2(a * -2.8853900817779268)
    # Near 0, where 1 - t cancels, an odd polynomial.
    p = a2 * -0.00628366228 + 0.0211214516
    p = p * a2 - 0.053876318
    p = p * a2 + 0.133329332
    p = p * a2 - 0.333333313
    y = tl.where(a < 0.6, a + a * (a2 * p), (1.0 - t) / (1.0 + t))
    return tl.where(x < 0.0, -y, y)


RUNTIME = [
    "num_sequences",
    "num_steps",
    "num_tokens",
    "num_keys",
    "window_left",
    "window_right",
    "seed",
    "threshold",
]
# What makes a case for tuning, beside the dtype.
CASE = ("GROUP", "HEAD_SIZE", "HAS_LEFT", "HAS_RIGHT", "HAS_DROPOUT", "SOFTCAP")


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q,  # (Tq, heads, HEAD_SIZE)
    k,  # (Tk, kv_heads, HEAD_SIZE)
    v,
    out,  # out (Tq, heads, HEAD_SIZE)
    lse,  # out (heads, Tq) fp32, to base 2
    cu_seqlens_q,  # (N + 1,) int32
    cu_seqlens_k,
    rows,  # (Tq,) int32, or None
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    scale,  # of the scores, times log2(e)
    window_left,
    window_right,
    seed,
    threshold,
    rescale,
    num_sequences,
    num_steps,
    num_tokens,
    num_keys,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SOFTCAP: tl.constexpr,  # of the scores; 0: none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A block of queries of one head against the keys that any of them may read."""
    head = tl.program_id(1)
    first, num_q, first_q, num_k, first_k, begin, end, fits = block_of(
        cu_seqlens_q, cu_seqlens_k, window_left, window_right, num_sequences, num_steps,
        num_tokens, num_keys,
        HAS_LEFT, HAS_RIGHT, BLOCK_M,
    )  # fmt: skip
    if first >= num_q:
        return
    i = first + tl.arange(0, BLOCK_M)
    in_q = i < num_q
    if fits == 0:
        nothing = tl.full([BLOCK_M, WIDTH], float("nan"), tl.float32)
        store_tile(out, nothing, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
        return
    place = i[:, None] + num_k - num_q
    q_tile = load_tile(q, q_token, q_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    if HAS_DROPOUT:
        streams = dropout.row_streams(seed, head, dropout.numbers(rows, first_q + i, in_q))[:, None]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_k = j < num_k
        k_tile = load_tile(
            k, k_token, k_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH
        )
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        if SOFTCAP > 0:
            scores = share_of_cap(scores, SOFTCAP) * (SOFTCAP * 1.4426950408889634)
        allowed = reads(place, j[None, :], num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # So far nothing to read: any finite number keeps -inf - -inf away.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if HAS_DROPOUT:
            weights = weights * dropout.factors(streams, j[None, :], threshold, rescale)
        v_tile = load_tile(
            v, v_token, v_head, head // GROUP, first_k + start, in_k, HEAD_SIZE, WIDTH
        )
        result = result * fade[:, None]
        result += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        highest = higher
    # Nothing to read gives 0; where there is something, but no score above -inf, 0 / 0 gives NaN.
    first_place = i * 0
    last_place = first_place + num_k - 1
    if HAS_LEFT:
        first_place = tl.maximum(first_place, i + num_k - num_q - window_left)
    if HAS_RIGHT:
        last_place = tl.minimum(last_place, i + num_k - num_q + window_right)
    empty = first_place > last_place
    result = result / tl.where(empty, 1.0, total)[:, None]
    store_tile(out, result, out_token, out_head, head, first_q + first, in_q, HEAD_SIZE, WIDTH)
    log_sum = tl.where(empty, float("inf"), highest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + head.to(tl.int64) * num_tokens + first_q + i, log_sum, mask=in_q)


def constants_of(
    q: Tensor,
    k: Tensor,
    window_left: int,
    window_right: int,
    dropout_p: float,
    softcap: float | None,
) -> launcher.Config:
    _, heads, size = q.shape
    return launcher.constants(
        GROUP=heads // k.shape[1],
        HEAD_SIZE=size,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=window_right >= 0,
        HAS_DROPOUT=dropout_p > 0,
        SOFTCAP=softcap or 0.0,  # a model has one: it is compiled in
    )


def windows(q: Tensor, k: Tensor, left: int, right: int) -> tuple[int, int]:
    """No window wider than all there is: places are added to it in 32 bits."""
    if left < 0 and right < 0:
        return left, right
    most = q.shape[0] + k.shape[0]
    return min(left, most), min(right, most)


def strides(*tensors: Tensor) -> list[int]:
    found: list[int] = []
    for tensor in tensors:
        found += tensor.stride()[:2]
    return found


def forward(
    q: Tensor,  # (Tq, heads, head_size), each head's row contiguous
    k: Tensor,  # (Tk, kv_heads, head_size)
    v: Tensor,
    cu_seqlens_q: Tensor,  # (N + 1,) int32
    cu_seqlens_k: Tensor,
    rows: Tensor | None,  # (Tq,) int32
    scale: float,
    window_left: int,
    window_right: int,
    dropout_p: float,
    seed: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The backend contract: out (Tq, heads, head_size), and lse (heads, Tq) fp32 for backward."""
    guard.require_gpu(q)
    if q.is_cpu:
        ragged.check_ends("cu_seqlens_q", cu_seqlens_q, q.shape[0])
        ragged.check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0:
        return out, lse
    few, capped = q.shape[0] <= 16 * num_sequences, softcap is not None
    config = launch(q.shape[2], q.dtype, "forward", few_queries=few, capped=capped)
    kernel, config = choose(forward_kernel, config, "forward")
    num_tokens, heads = q.shape[:2]
    numbers = (
        *strides(q, k, v, out),
        scale * 1.4426950408889634,
        *windows(q, k, window_left, window_right),
        *dropout.scalars(dropout_p, seed),
        *(num_sequences, (num_sequences - 1).bit_length(), num_tokens, k.shape[0]),
    )
    launcher.launch(
        kernel,
        lambda meta: (num_tokens // meta["BLOCK_M"] + num_sequences, heads),
        (q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rows),
        numbers,
        constants_of(q, k, window_left, window_right, dropout_p, softcap),
        config,
    )
    return out, lse


_CASES_COMPILED = {
    "bf16": (
        "plain",
        "dropout_window",
        "dropout_window_rows",
        "one_query",
        "dropout_sums",
        "capped_window",
        "capped_dropout_window_rows",
        "capped_one_query",
    ),
    "fp16": ("plain", "dropout_window_rows"),
    "fp32": (
        "plain",
        "dropout_window_rows",
        "one_query",
        "dropout_sums",
        "capped_window",
        "capped_dropout_window_rows",
        "capped_one_query",
    ),
}


def variants(kernels: dict[Part, Any]) -> Iterator[Variant]:
    """Every head size class and dtype: plain, with dropout and a window, also of some rows alone,
    for a single query a sequence, with dropout and sums, as BERT trains, and with a softcap, as
    Gemma 2 trains. What differs from another in nothing that the compiler sees is left out: fp16 is
    bf16, and rows are one load more.
    """
    cases = [(torch.bfloat16, size) for size in (32, 64, 128, 256)] + [(torch.float16, 64)]
    cases += [(torch.float32, size) for size in (32, 64, 128, 256)]
    for dtype, size in cases:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for case in _CASES_COMPILED[name]:
            few, windowed = case.endswith("one_query"), "window" in case
            constants: dict[str, Any] = {
                "GROUP": 1,
                "HEAD_SIZE": size,
                "HAS_LEFT": windowed,
                "HAS_RIGHT": windowed,
            }
            if not case.endswith("rows"):
                constants["rows"] = None
            for part, kernel in kernels.items():
                types = {argument: _type(argument, name) for argument in kernel.arg_names}
                if "sums" in types and not case.endswith("sums"):
                    constants["sums"] = None
                elif case.endswith("sums") and "sums" not in types:
                    continue  # dropout without a window is one with a window, and less
                capped = "capped" in case
                configs = [
                    launch(size, dtype, part, few_queries=few, capped=capped, hip=hip)
                    for hip in (False, True)
                ]
                yield Variant(
                    name=f"varlen_attention-{kernel.__name__}_{name}_{size}_{case}",
                    kernel=kernel,
                    types=types,
                    config=configs[0],
                    hip_config=configs[1],
                    constants=constants
                    | {"HAS_DROPOUT": "dropout" in case, "SOFTCAP": 50.0 * capped},
                    # What Triton finds at a launch: aligned tensors, and strides of multiples of
                    # 16.
                    multiples=[
                        a
                        for a in types
                        if types[a].startswith("*") or a.endswith(("_token", "_head"))
                    ],
                )


def shipped() -> Iterator[Variant]:
    return variants({"forward": forward_kernel})


def _type(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"):
        return f"*{dtype}"
    if argument in ("lse", "along", "sums"):
        return "*fp32"
    if argument.startswith("cu_seqlens") or argument == "rows":
        return "*i32"
    return "fp32" if argument in ("scale", "log2_scale", "rescale") else "i32"

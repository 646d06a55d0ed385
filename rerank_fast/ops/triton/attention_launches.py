"""How varlen attention's kernels are launched: tiles, warps and registers by case, what tuning
tries beside them, and the cases that are compiled ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch

from rerank_fast.ops.triton import autotune, guard, launcher
from rerank_fast.ops.triton.grid import next_power_of_2
from rerank_fast.ops.triton.variant import Variant

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
# What makes a case for tuning, beside the dtype.
CASE = ("GROUP", "HEAD_SIZE", "HAS_LEFT", "HAS_RIGHT", "HAS_DROPOUT", "SOFTCAP")


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
    attention's kernels run. More of it takes smaller tiles, and those more instructions: with 16
    keys for 32, 1.6 times as many a score. More warps on the same rows, 8 on 64, compute every
    score twice.
    """
    width = max(16, next_power_of_2(head_size))
    warps = 8 if width > {"forward": 256, "queries": 64, "keys": 32}[part] else 4
    stages = 2
    if dtype == torch.float32:
        # Exact products go through the FMA units: a thread holds all of its tile.
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


def _type(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"):
        return f"*{dtype}"
    if argument in ("lse", "along", "sums"):
        return "*fp32"
    if argument.startswith("cu_seqlens") or argument == "rows":
        return "*i32"
    return "fp32" if argument in ("scale", "log2_scale", "rescale") else "i32"

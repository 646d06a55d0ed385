"""Compile the shipped Triton kernels for targets that need not be there; prints one JSON object a line.

Run as a program, without TRITON_INTERPRET: the tests beside it run the same kernels in the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rerank_fast.ops.triton import lambda_loss

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)] + [GPUTarget("hip", "gfx942", 64)]
_ARRAYS = {
    "scores": "*fp32",
    "labels": "*fp32",
    "offsets": "*i64",
    "rank": "*i32",
    "pairs": "*i32",
    "k": "i32",
}


def sources():
    """(name, ASTSource, num_warps) of every kernel as the launcher ships it."""
    kernels = [(lambda_loss.rank_kernel, {}, lambda_loss.LAUNCH)]
    kernels += [(lambda_loss.pair_kernel, {"SCHEME": s}, lambda_loss.LAUNCH) for s in range(5)]
    kernels += [(lambda_loss.list_sum_kernel, {}, lambda_loss._REDUCE)]
    for kernel, options, launch in kernels:
        constants = {"dtype": tl.float32, "BLOCK": launch["BLOCK"], **options}
        signature = {}
        for name in kernel.arg_names:
            scalar = "fp32" if name in ("sigma", "mu", "eps", "scale") else "*fp32"
            signature[name] = "constexpr" if name in constants else _ARRAYS.get(name, scalar)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        yield kernel.__name__ + "".join(f"_{v}" for v in options.values()), source, launch["num_warps"]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and spilled bytes of the one kernel in a cubin."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True, stderr=subprocess.STDOUT)
    return {key: int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    for target in TARGETS:
        for name, source, num_warps in sources():
            compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
            binary = "cubin" if target.backend == "cuda" else "hsaco"
            row = {"target": str(target.arch), "kernel": name, "bytes": len(compiled.asm[binary])}
            if binary == "cubin":
                row |= resources(compiled.asm[binary])
            print(json.dumps(row), flush=True)

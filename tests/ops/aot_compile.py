"""Compile the shipped Triton kernels for targets that need not be there; prints one JSON object a line.

    python -m tests.ops.aot_compile [--targets 90 gfx942] [--sass]

Run as a program, without TRITON_INTERPRET: the tests beside it run the same kernels in the interpreter. For NVIDIA
targets a row holds registers, stack, spilled bytes and shared memory; with --sass also the instructions that the
tile loop of 32 x 32 documents takes, by kind (cuobjdump's count in the whole kernel).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rerank_fast.ops.triton import lambda_loss

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)] + [GPUTarget("hip", "gfx942", 64)]
# By argument name; arrays of the compute dtype are the rest.
_TYPES = {
    "offsets": "*i64",
    "rank": "*i32",
    "pairs": "*i64",
    **dict.fromkeys(["k", "num_lists", "num_steps", "num_blocks", "n"], "i32"),
    **dict.fromkeys(["sigma", "mu", "eps", "scale"], "fp64"),
}


def sources() -> Iterator[tuple[str, ASTSource, int]]:
    """(name, ASTSource, num_warps) of every kernel as the launcher ships it."""
    for scores in ("fp32", "bf16", "fp16", "fp64"):
        wide = scores == "fp64"
        launch = lambda_loss.LAUNCH_FP64 if wide else lambda_loss.LAUNCH
        kernels: list[tuple[Any, dict[str, Any], dict[str, int]]] = [(lambda_loss.rank_kernel, {}, launch)]
        # The half precisions differ in one load: one scheme shows it.
        for scheme in range(5) if scores in ("fp32", "fp64") else [4]:
            options = {"SCHEME": scheme, "PER_DOCUMENT": False}
            kernels.append((lambda_loss.pair_kernel, options, launch))
        if scores == "fp32":
            kernels.append((lambda_loss.pair_kernel, {"SCHEME": 4, "PER_DOCUMENT": True}, launch))
        if scores in ("fp32", "fp64"):
            kernels.append((lambda_loss.mean_kernel, {"REDUCTION": "pairs"}, lambda_loss.FINISH))
            kernels.append((lambda_loss.list_sum_kernel, {}, lambda_loss.FINISH))
        for kernel, options, config in kernels:
            constants = {"dtype": tl.float64 if wide else tl.float32, "BLOCK": config["BLOCK"], **options}
            types = _TYPES | {"scores": f"*{scores}"}
            signature = {
                name: "constexpr" if name in constants else types.get(name, "*fp64" if wide else "*fp32")
                for name in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            name = "_".join([kernel.__name__, scores, *map(str, options.values())])
            yield name, source, config["num_warps"]


def resources(cubin: bytes, *, sass: bool) -> dict[str, Any]:
    """Registers, stack, spilled bytes and shared memory of a cubin's one kernel; with sass its instructions."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True, stderr=subprocess.STDOUT)
        row: dict[str, Any] = {}
        for key in ("REG", "STACK", "LOCAL", "SHARED"):
            match = re.search(rf"{key}:(\d+)", text)
            assert match, text
            row[key] = int(match.group(1))
        if sass:
            listing = subprocess.check_output([tool, "-sass", file.name], text=True, stderr=subprocess.STDOUT)
            kinds = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", listing, re.MULTILINE))
            row["instructions"] = sum(kinds.values())
            row |= {kind: kinds[kind] for kind in ("MUFU", "FFMA", "FMUL", "FADD", "LDG", "STG", "BAR", "SHFL")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=[str(target.arch) for target in TARGETS])
    parser.add_argument("--sass", action="store_true", help="count instructions")
    options = parser.parse_args()
    for target in TARGETS:
        if str(target.arch) not in options.targets:
            continue
        for name, source, num_warps in sources():
            compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
            binary = "cubin" if target.backend == "cuda" else "hsaco"
            row = {"target": str(target.arch), "kernel": name, "bytes": len(compiled.asm[binary])}
            if binary == "cubin":
                row |= resources(compiled.asm[binary], sass=options.sass)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

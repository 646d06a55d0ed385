"""What the shipped Triton kernels compile to, without a GPU: registers, occupancy and instructions
per target.

    python -m benchmarks.tools.kernel_report [--kernels pair_kernel-fp32] [--targets 90 gfx942]

Instructions of a loop are counted in the disassembled body between a backward branch and its
target. Times at the end are estimates from datasheets, not measurements. Run it without
TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from benchmarks.arguments import make_parser
from rerank_fast.ops.triton import (
    add_norm,
    approx_ranks,
    column_sums,
    embedding,
    gated,
    gelu,
    guard,
    lambda_loss,
    ndcg,
    relative_attention,
    relative_attention_backward,
    relative_table_grads,
    residual_norm,
    rotary,
    score_head,
    score_head_backward,
    varlen_attention,
    varlen_attention_backward,
)
from rerank_fast.ops.triton.variant import Variant

TARGETS = {str(arch): GPUTarget("cuda", arch, 32) for arch in (80, 86, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


# The files whose shipped() yields a Variant for each way a kernel is launched.
SOURCES = (
    add_norm,
    approx_ranks,
    column_sums,
    embedding,
    gated,
    gelu,
    lambda_loss,
    ndcg,
    relative_attention,
    relative_attention_backward,
    relative_table_grads,
    residual_norm,
    rotary,
    score_head,
    score_head_backward,
    varlen_attention,
    varlen_attention_backward,
)

# Per multiprocessor: warps, blocks, bytes of shared memory (CUDA programming guide, compute
# capabilities).
_LIMITS = {
    "80": (64, 32, 164),
    "86": (48, 16, 100),
    "90": (64, 32, 228),
    "100": (64, 32, 228),
    "120": (48, 24, 100),
}
_OWN_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
_COUNTED = ("MUFU", "FFMA", "FADD", "FMUL", "SHFL", "BAR", "LDG", "STG", "LDS", "STS")


def _occupancy(target: str, registers: int, shared: int, num_warps: int) -> float:
    if (
        target == "gfx942"
    ):  # 8 waves a SIMD; 512 vector registers in steps of 8; 64 KiB LDS for the 4 SIMDs
        waves = min(8, 512 // max(8, -(-registers // 8) * 8))
        blocks = min(waves * 4 // num_warps, 65536 // shared if shared else 32)
        return min(1.0, blocks * num_warps / 32)
    warps, blocks, shared_kib = _LIMITS[target]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // num_warps
    by_shared = shared_kib * 1024 // (shared + 1024)  # 1 KiB a block is the system's
    return min(blocks, warps // num_warps, by_registers, by_shared) * num_warps / warps


def _instructions(sass: str) -> list[tuple[int, str, int | None]]:
    """(address, operation, target of a branch) of each instruction."""
    found = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;\n]*)", sass, re.MULTILINE
    )
    result = []
    for address, operation, rest in found:
        goal = re.search(r"0x([0-9a-f]+)\s*$", rest) if operation.startswith("BRA") else None
        result.append((int(address, 16), operation, int(goal.group(1), 16) if goal else None))
    return result


def _inner_loops(instructions: list[tuple[int, str, int | None]]) -> list[list[str]]:
    """Operations of the loops that hold no other loop: what lies between a backward branch and its
    target.
    """
    bounds = [
        (goal, address) for address, _, goal in instructions if goal is not None and goal < address
    ]
    inner = [
        (low, high)
        for low, high in bounds
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b in bounds)
    ]
    return [
        [operation for address, operation, _ in instructions if low <= address <= high]
        for low, high in inner
    ]


def _count(operations: Iterable[str]) -> dict[str, int]:
    # FFMA2 and its like are sm_100's two operations in one instruction.
    kinds = Counter(
        re.sub(r"^(F\w+)2$", r"\1", operation.split(".")[0]) for operation in operations
    )
    return {"instructions": sum(kinds.values()) - kinds["NOP"]} | {
        kind: kinds[kind] for kind in _COUNTED
    }


def _nvidia(cubin: bytes, variant: Variant, num_warps: int) -> dict[str, Any]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output(
            [tool, "-res-usage", "-sass", file.name], text=True, stderr=subprocess.STDOUT
        )
    row: dict[str, Any] = {}
    for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL")):
        match = re.search(rf"{key}:(\d+)", text)
        if match is None:
            raise RuntimeError(f"cuobjdump -res-usage has no {key}:\n{text}")
        row[name] = int(match.group(1))
    instructions = _instructions(text)
    operations = [operation for _, operation, _ in instructions]
    # A spill is a store to local memory and a load from it.
    row["spills"] = sum(operation.split(".")[0] in ("STL", "LDL") for operation in operations)
    row["kernel"] = _count(operations)
    row["loops"] = []
    if variant.anchor:
        for body in _inner_loops(instructions):
            if any(operation.startswith(variant.anchor) for operation in body):
                units = sum(operation.startswith(variant.unit) for operation in body)
                per_thread = variant.items / (num_warps * 32)
                if not units or units % per_thread:
                    raise RuntimeError(
                        f"{variant.name}: {units} {variant.unit} in a loop of {per_thread} items"
                    )
                row["loops"].append({kind: count / units for kind, count in _count(body).items()})
    return row


def _amd(assembly: str) -> dict[str, Any]:
    def value(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"the assembly's metadata has no {name}")
        return int(match.group(1))

    return {
        "registers": value("vgpr_count"),
        "scalar_registers": value("sgpr_count"),
        "stack": value("private_segment_fixed_size"),
        "local": 0,
        "spills": value("vgpr_spill_count"),
        "scalar_spills": value("sgpr_spill_count"),  # to lanes of a vector register, not to memory
        "loops": [],
    }


@functools.cache
def _variants() -> dict[str, Variant]:
    return {variant.name: variant for source in SOURCES for variant in source.shipped()}


def _names(files: Collection[str], parts: Collection[str]) -> list[str]:
    """Of the kernels in these files whose names have one of these parts; no parts: all."""
    chosen = [source for source in SOURCES if source.__name__.rpartition(".")[2] in files]
    names = [variant.name for source in chosen for variant in source.shipped()]
    return [name for name in names if not parts or any(part in name for part in parts)]


def _compile_named(name: str, target: str) -> dict[str, Any]:
    return compile_variant(_variants()[name], target)


def compile_variant(variant: Variant, target: str) -> dict[str, Any]:
    """One row of the report."""
    amd = target == "gfx942"
    config = guard.for_vendor(
        variant.hip_config if amd and variant.hip_config else variant.config, hip=amd
    )
    blocks = {name: value for name, value in config.items() if name.isupper()}
    options = {name: value for name, value in config.items() if not name.isupper()}
    constants = blocks | variant.constants
    signature = {
        name: "constexpr" if name in constants else variant.types[name]
        for name in variant.kernel.arg_names
    }
    # As at run time: the allocator aligns tensors, so pointers are specialised on 16 bytes.
    multiples = variant.multiples or [
        name for name, kind in signature.items() if kind.startswith("*")
    ]
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if name in multiples and name not in constants
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    num_warps = options.get("num_warps", 4)
    # Triton keeps what it has compiled by a hash of all that goes in; what was read of it, too.
    kept = get_cache_manager(compiled.hash)
    asked = f"report-{variant.anchor}-{variant.unit}-{variant.items}-{_OWN_HASH}.json"
    if (file := kept.get_file(asked)) is not None:
        row = json.loads(Path(file).read_text())
    else:
        row = (
            _amd(compiled.asm["amdgcn"])
            if amd
            else _nvidia(compiled.asm["cubin"], variant, num_warps)
        )
        kept.put(json.dumps(row), asked, binary=False)
    shared = compiled.metadata.shared
    return {
        "kernel_name": variant.name,
        "target": target,
        "num_warps": num_warps,
        "shared": shared,
        "occupancy": _occupancy(target, row["registers"], shared, num_warps),
        **row,
    }


# Datasheets: multiprocessors, boost clock in GHz, bytes a second, bf16 operations a second of the
# tensor cores. A cycle issues 4 warp instructions on each multiprocessor, and 16 special functions.
_CARDS = {
    "H100 SXM": ("90", 132, 1.98, 3.35e12, 989e12),
    "RTX 3090": ("86", 82, 1.695, 0.936e12, 71e12),
}
# lists, documents, share of visited (row, column) pairs: 2 P (D - P) / D^2, or 2 x pairs of 5
# grades
_SHAPES = {
    "16 x 10 binary": (16, 10, 0.255),
    "64 x 32 binary": (64, 32, 0.255),
    "64 x 100 binary": (64, 100, 0.255),
    "16 x 1000 binary": (16, 1000, 0.255),
    "16 x 1000 graded": (16, 1000, 0.8),
}


def roofline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Estimated floors in microseconds of NDCGLoss2++ in fp32, full tiles assumed, launches and
    latency left out.

    Bytes: scores, labels and gradient from and to memory, once. Operations: counted instructions of
    the pair loops.
    """
    estimates = []
    for card, (target, processors, clock, bandwidth, _) in _CARDS.items():
        loops = next(
            (
                row["loops"]
                for row in rows
                if row["target"] == target
                and row["kernel_name"].startswith("pair_kernel-fp32-SCHEME=ndcg2pp")
            ),
            None,
        )
        if not loops:
            continue
        for shape, (lists, documents, share) in _SHAPES.items():
            visited = lists * documents**2 * share
            # Half of the visits are to better documents, half to worse ones.
            instructions = visited * sum(loop["instructions"] for loop in loops) / 2
            special = visited * sum(loop["MUFU"] for loop in loops) / 2
            moved = lists * documents * 12
            estimates.append(
                {
                    "estimate": card,
                    "shape": shape,
                    "visited_pairs": round(visited),
                    "bytes": moved,
                    "memory_us": moved / bandwidth * 1e6,
                    "issue_us": instructions / 32 / (processors * 4 * clock * 1e3),
                    "special_us": special / 16 / (processors * clock * 1e3),
                }
            )
    return estimates


_LENGTHS = (32, 92, 300, 512, 2048)  # tokens of each of 10,000 // length sequences, 12 heads


def attention_roofline() -> list[dict[str, Any]]:
    """Estimated floors in microseconds of varlen_attention's forward in bf16, launch and latency
    left out.

    Bytes: queries, keys, values and results, once. Operations: two products, and an exponential a
    score.
    """
    estimates = []
    for (card, (_, processors, clock, bandwidth, tensor)), size, length in itertools.product(
        _CARDS.items(), (32, 64), _LENGTHS
    ):
        rows = 10_000 // length * length * 12
        moved = 4 * rows * size * 2
        estimates.append(
            {
                "attention_estimate": card,
                "head_size": size,
                "length": length,
                "memory_us": moved / bandwidth * 1e6,
                "tensor_us": 4 * rows * length * size / tensor * 1e6,
                "special_us": rows * length / 16 / (processors * clock * 1e3),
            }
        )
    return estimates


def _table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'kernel':<58} target  regs spills stack shared occupancy | each loop, an item: all, "
        "MUFU, F*, LDG"
    )
    print(
        "F*: FFMA + FADD + FMUL. A loop's figures are per item, of a pair_kernel per visited pair."
    )
    for row in rows:
        loops = "; ".join(
            f"{loop['instructions']:.1f} {loop['MUFU']:.2f} "
            f"{loop['FFMA'] + loop['FADD'] + loop['FMUL']:.1f} {loop['LDG']:.2f}"
            for loop in row["loops"]
        )
        whole = row.get("kernel", {})
        whole = " ".join(
            f"{kind}={whole[kind]}"
            for kind in ("MUFU", "SHFL", "BAR", "LDG", "STG")
            if kind in whole
        )
        print(
            f"{row['kernel_name']:<58} {row['target']:>6} {row['registers']:>5} {row['spills']:>6} "
            f"{row['stack']:>5} {row['shared']:>6} {row['occupancy']:>9.0%} | {loops} | {whole}"
        )


def main() -> None:
    parser = make_parser(__name__)
    parser.add_argument(
        "--kernels", nargs="*", help="parts of names: only the kernels that have one of them"
    )
    files = [source.__name__.rpartition(".")[2] for source in SOURCES]
    parser.add_argument(
        "--sources", nargs="*", default=files, choices=files, help="files of rerank_fast.ops.triton"
    )
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("kernel_report compiles kernels: unset TRITON_INTERPRET")
    names = _names(arguments.sources, arguments.kernels or ())
    with ProcessPoolExecutor(
        arguments.jobs, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        rows = list(
            pool.map(
                _compile_named, *zip(*itertools.product(names, arguments.targets), strict=True)
            )
        )
    _table(rows)
    estimates = roofline(rows)
    if estimates:
        print(
            "\nEstimates from datasheets, not measurements: floors in microseconds, NDCGLoss2++ "
            "fp32, forward"
        )
    for row in estimates:
        print(
            f"{row['estimate']:<10} {row['shape']:<18} {row['visited_pairs']:>10} pairs visited, "
            f"{row['bytes']:>8} bytes: memory {row['memory_us']:.2f}, issue {row['issue_us']:.2f}, "
            f"special functions {row['special_us']:.2f}"
        )
    attention = (
        attention_roofline()
        if any(row["kernel_name"].startswith("varlen_attention") for row in rows)
        else []
    )
    if attention:
        print(
            "\nEstimates from datasheets, not measurements: floors in microseconds, "
            "varlen_attention bf16, forward"
        )
    for row in attention:
        print(
            f"{row['attention_estimate']:<10} 12 heads of {row['head_size']}, 10,000 tokens in "
            f"sequences of {row['length']:>4}: memory {row['memory_us']:.1f}, tensor cores "
            f"{row['tensor_us']:.1f}, special functions {row['special_us']:.1f}"
        )
    if arguments.output:
        report = {"kernels": rows, "estimates": estimates, "attention_estimates": attention}
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

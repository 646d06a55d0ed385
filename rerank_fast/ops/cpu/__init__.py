"""The CPU backend hands tensors' addresses to the compiled kernels in csrc/.

Here is the compiled module, which nothing else imports, and which of its kernels run; a file beside
has what each room of csrc/ computes.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

try:
    import rerank_fast._C as _compiled
except ImportError as error:
    _C: Any = None
    _reason = str(error)
else:
    _C, _reason = _compiled, ""


def available() -> bool:
    """Whether the compiled module is there."""
    return _C is not None


def compiled() -> Any:
    """The compiled module."""
    return _C


def unavailable_reason() -> str:
    """What is missing and how to get it."""
    return (
        f"the compiled module rerank_fast._C is missing ({_reason}). Install a C++17 compiler "
        "(Debian and Ubuntu: apt-get install g++) and run: pip install --force-reinstall --no-deps "
        "-e ."
    )


def instruction_sets() -> list[str]:
    """Those that the kernels were built for and that this processor has, widest first.

    Of x86-64 sse4, avx2, avx512, avx512_bf16 and amx_bf16; of 64-bit Arm neon and neon_bf16.
    amx_bf16 is AVX-512 with bf16 whose attention multiplies bf16 in tiles: Linux has to permit the
    process to use them.
    """
    return _C.instruction_sets() if available() else []


def instruction_set() -> str:
    """The one whose kernels run."""
    return _C.instruction_set()


def choose_instruction_set(name: str) -> None:
    """Run another one's kernels from now on, in the whole process; for tests and measuring.

    RERANK_FAST_ISA names it from outside. Not while a kernel runs in another thread.

    Raises:
        ValueError: it is none of instruction_sets().
    """
    if name not in instruction_sets():
        here = ", ".join(instruction_sets()) or "none: there is no compiled module"
        raise ValueError(
            f"instruction set (RERANK_FAST_ISA) must be one that this machine has ({here}), got "
            f"{name!r}"
        )
    _C.choose_instruction_set(name)


if available() and not instruction_sets():
    _C, _reason = None, "this processor has none of the instruction sets that it was built for"
if available() and os.environ.get("RERANK_FAST_ISA"):
    choose_instruction_set(os.environ["RERANK_FAST_ISA"])


def address(tensor: Tensor | None) -> int:
    """Of its data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()

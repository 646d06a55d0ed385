"""What a kernel file says of its kernels in shipped(), for reports that compile them without a
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Variant:
    """One kernel as its launcher ships it.

    items: what a program handles in one trip through an inner loop (the pairs of a tile); anchor:
    an instruction that tells loops over items from others; unit: one that they have once an item,
    which undoes unrolling.
    """

    name: str
    kernel: Any
    # By argument, as in triton.compile: "*fp32", "i32", ...; constexprs are left out.
    types: dict[str, str]
    config: dict[str, Any]  # as the launcher gives it: blocks in capitals, num_warps and the like
    # The other constexprs; None: an argument left out.
    constants: dict[str, Any] = field(default_factory=dict)
    hip_config: dict[str, Any] | None = None  # on AMD; None: config
    items: int = 0
    anchor: str = ""
    unit: str = ""
    multiples: list[str] | None = None  # arguments that 16 divides at a launch; None: the pointers

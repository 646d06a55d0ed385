"""Numbers of blocks, on the host.

Triton's own cdiv and next_power_of_2 serve kernels too and unwrap their arguments at every call, a
tenth of the host's time of a training step.
"""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """How many blocks of a size hold a count."""
    return -(-count // size)


def next_power_of_2(value: int) -> int:
    """The least one that is at least a value of at least 1."""
    return 1 << (value - 1).bit_length()

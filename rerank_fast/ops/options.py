"""Checks of the ops' options: a ValueError names the option, what it must be, and what came."""

from __future__ import annotations

import operator
from numbers import Integral, Real
from typing import Any, NoReturn

import torch

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def _refuse(name: str, expected: str, value: object) -> NoReturn:
    raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of choices."""
    if not isinstance(value, str) or value not in choices:
        _refuse(name, f"one of {choices}", value)


def check_flag(name: str, value: bool) -> None:
    """Raises ValueError unless value is True or False."""
    if not isinstance(value, bool):
        _refuse(name, "True or False", value)


def _is_whole(value: Any, least: int, bits: int) -> bool:
    # A symbol of torch.compile's is an int in a program that is traced; elsewhere it is not.
    plain = type(value) in (int, torch.SymInt)
    known = plain or (isinstance(value, Integral) and not isinstance(value, bool))
    return known and bool(least <= value < 2**bits)


def _as_int(value: int) -> int:
    """NumPy's integers as Python's; a symbol stays one."""
    return value if type(value) in (int, torch.SymInt) else operator.index(value)


def check_cut(k: int | None) -> int:
    """A cut by rank as an int; 0 for none."""
    if k is None:
        return 0
    if not _is_whole(k, 0, 63):
        _refuse("k", "None or a whole number from 0 to 2**63 - 1", k)
    return _as_int(k)


def check_seed(value: int) -> int:
    """The seed of a dropout as an int."""
    if not _is_whole(value, 0, 63):
        _refuse("seed", "a whole number from 0 to 2**63 - 1", value)
    return _as_int(value)


def check_window(sides: tuple[int, int] | None) -> tuple[int, int]:
    """(left, right) of an attention window, -1 where it is unlimited."""
    return (-1, -1) if sides is None else _two_whole("window", sides, -1)


def check_lengths(name: str, lengths: tuple[int, int] | None) -> tuple[int, int] | None:
    """The most queries and the most keys of a sequence, or None."""
    return None if lengths is None else _two_whole(name, lengths, 0)


def _two_whole(name: str, values: tuple[int, int], least: int) -> tuple[int, int]:
    two = isinstance(values, (tuple, list)) and len(values) == 2
    if not two or not all(_is_whole(value, least, 31) for value in values):
        _refuse(name, f"None or two whole numbers from {least} to 2**31 - 1", values)
    return _as_int(values[0]), _as_int(values[1])


def check_number(name: str, value: float, *, least: float = -_LARGEST) -> float:
    """value as a float; kernels take it in fp32, in which it must be finite and not below least."""
    if not _is_number(value, least):
        bound = "" if least == -_LARGEST else f" of at least {least:g}"
        _refuse(name, f"a finite fp32 number{bound}", value)
    return float(value)


def check_positive(name: str, value: float) -> float:
    """value as a float; kernels take it in fp32, in which it must be finite and above 0."""
    if not _is_number(value, _SMALLEST):
        _refuse(name, "a finite fp32 number above 0", value)
    return float(value)


def check_share(name: str, value: float) -> float:
    """value as a float from 0 on and below 1."""
    if not _is_number(value, 0) or value >= 1:
        _refuse(name, "at least 0 and below 1", value)
    return float(value)


def _is_number(value: Any, least: float) -> bool:
    plain = type(value) in (int, float)  # spares the hot path an abstract class
    known = plain or (isinstance(value, Real) and not isinstance(value, bool))
    return known and bool(least <= value <= _LARGEST)  # false for NaN

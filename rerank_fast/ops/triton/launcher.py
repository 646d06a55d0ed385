"""Launches that look a kernel up by what its compilation depends on, and by nothing else.

Triton looks at every argument of every launch, and makes strings of what it finds: that takes the
host longer than the rest of a launch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver

from rerank_fast.ops.triton import guard

_ALIGNMENT = 16  # bytes, of tensors that Triton compiles for
_MOST = 1024  # compiled ones of a kernel; more were numbers that should not be specialised


class Config(dict[str, Any]):
    """Constants of a kernel, or options of its compilation, that stay as they are made: launches
    look at which these are, not at what they hold.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


@functools.cache
def constants(**values: Any) -> Config:
    """The one Config of these values."""
    return Config(values)


class _Known:
    """What is known of a kernel that has been launched."""

    def __init__(self, kernel: Any, num_tensors: int, numbers: Sequence[int | float]) -> None:
        self.kernel = kernel  # kept: nothing else gets its id
        # Gives those of a launch's numbers that Triton compiles for. None where it must look the
        # kernel up itself: a tuner, one of the interpreter, and on AMD's GPUs all, as there a
        # tensor's size matters too.
        self.chosen: Callable[[Sequence[int | float]], Sequence[int | float]] | None = None
        # What was compiled, by all that it depends on, and the constants behind its arguments.
        self.compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        if type(kernel) is JITFunction and not guard.HIP:
            parameters = kernel.params[num_tensors : num_tensors + len(numbers)]
            places = [
                place
                for place, (one, number) in enumerate(zip(parameters, numbers, strict=True))
                if isinstance(number, int) and not one.do_not_specialize
            ]
            if len(places) > 1:
                self.chosen = operator.itemgetter(*places)
            else:
                self.chosen = lambda given: [given[place] for place in places]


_known: dict[int, _Known] = {}  # by the kernel's id: its hash is that of its source


def launch(
    kernel: Any,
    grid: Any,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    *configs: Config,
) -> None:
    """kernel[grid](*tensors, *numbers, **config) on the device of the tensors, with all of the
    configs in one.

    Args:
        kernel: a JITFunction, or a tuner around one.
        grid: programs along up to three dimensions, or what gives them for the last config.
        tensors: the kernel's first arguments: the first of them on a GPU, all others there too or
            None.
        numbers: its arguments up to the constants; those that are not specialised are below 2**31.
        configs: its constants, and options of the compilation.
    """
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = _Known(kernel, len(tensors), numbers)
    first = tensors[0]
    assert first is not None
    device = first.get_device()
    if known.chosen is None or device != driver.active.get_current_device():
        _by_triton(kernel, grid, tensors, numbers, configs)
        return
    case: list[Any] = [device, *configs]
    addresses: list[int | None] = []
    bits = 0
    for one in tensors:
        if one is None:
            case.append(None)
            addresses.append(None)
        else:
            address = one.data_ptr()
            bits |= address
            case.append(one.dtype)
            addresses.append(address)
    if bits % _ALIGNMENT:  # a slice that lies between: another kernel
        _by_triton(kernel, grid, tensors, numbers, configs)
        return
    key = (*case, *known.chosen(numbers))
    found = known.compiled.get(key)
    if found is None:
        compiled = _by_triton(kernel, grid, tensors, numbers, configs)
        if len(known.compiled) >= _MOST:
            known.compiled.clear()
        config = _joined(configs)
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        known.compiled[key] = compiled, tuple(config[name] for name in names)
        return
    compiled, values = found
    if callable(grid):
        grid = grid(configs[-1])
    # The driver is not asked of an address whether it is a GPU's.
    stream = driver.active.get_current_stream(device)
    compiled[(*grid, 1, 1)[:3]](*addresses, *numbers, *values, stream=stream)


def _joined(configs: Sequence[Config]) -> dict[str, Any]:
    return {name: value for config in configs for name, value in config.items()}


def _by_triton(
    kernel: Any,
    grid: Any,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    configs: Sequence[Config],
) -> Any:
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(tensors[0]):
        return kernel[grid](*tensors, *numbers, **_joined(configs))

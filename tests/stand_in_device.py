"""A device that this package knows nothing of: importing this file registers it as "standin".

It computes on the host, has a generator of its own, and no fp64. For a process of its own: torch
keeps the name for ever.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "standin"
_generator = torch.Generator().manual_seed(1)


class OnStandIn(Tensor):
    """A tensor there, around the one of the host that has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnStandIn:
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
        )
        made.raw = raw
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    known: dict[int, OnStandIn] = {}
    device = kwargs.get("device")
    to_host = device is not None and torch.device(device).type == "cpu"
    to_host = to_host or (func._opname == "copy_" and not isinstance(args[0], OnStandIn))

    def down(value: Any) -> Any:
        if isinstance(value, OnStandIn):
            known[id(value.raw)] = value
            return value.raw
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def up(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_host:
            return value
        if value.dtype == torch.float64:
            raise TypeError(f"{func}: this device has no float64")
        return known[id(value)] if id(value) in known else OnStandIn(value)

    args, kwargs = tree_map(down, args), tree_map(down, kwargs)
    with (
        _own_draws() if torch.Tag.nondeterministic_seeded in func.tags else contextlib.nullcontext()
    ):
        return tree_map(up, func(*args, **kwargs))


@contextlib.contextmanager
def _own_draws() -> Any:
    host = torch.get_rng_state()
    torch.set_rng_state(_generator.get_state())
    yield
    _generator.set_state(torch.get_rng_state())
    torch.set_rng_state(host)


class _Module:
    """What torch.cuda is for CUDA."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        _generator.manual_seed(seed)

    def get_rng_state(self, device: Any) -> Tensor:
        return _generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        _generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_run, "PrivateUse1")
# A parameter can't take a tensor of this class for its data, but change places with one.
torch.__future__.set_swap_module_params_on_conversion(True)

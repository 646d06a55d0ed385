"""A model may lie on another GPU than the current one: kernels are launched on their tensors'
device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.tools.gpu_parts import odd_shapes
from tests.ops.test_backends import require_triton


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("part", ["attention", "norms_and_heads", "vector_gradients", "losses"])
def test_every_launch_stands_under_its_tensors_device(part: str, monkeypatch: pytest.MonkeyPatch):
    require_triton()
    from triton.runtime.interpreter import GridExecutor

    under: list[torch.device] = []
    launched: list[str] = []
    call = GridExecutor.__call__

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        under.append(tensor.device)
        yield
        under.pop()

    def launch(executor: GridExecutor, *arguments: object, **options: object) -> object:
        launched.append(executor.fn.__name__)
        assert under, f"{launched[-1]} is launched on whatever device is the current one"
        assert all(one.device == under[-1] for one in arguments if isinstance(one, Tensor))
        return call(executor, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    getattr(odd_shapes, part)(*odd_shapes.INTERPRETED[part])
    least = {"attention": 3, "norms_and_heads": 4, "vector_gradients": 2, "losses": 4}
    assert len(set(launched)) >= least[part], launched

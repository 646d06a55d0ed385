"""What stands in for a GPU where a step runs without one: Triton's launcher and driver, products
that a CPU has not, and CUDA's graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.tools.gpu_counts import DeviceCounts
from rerank_fast.model import cross_encoder, pretrained
from rerank_fast.model.packed import bucket_encoder, encoder, gradients, linear, ready_layers
from rerank_fast.ops import layer_kernels, ragged, registry
from rerank_fast.ops.triton import guard
from rerank_fast.training import backward


class _StandInDriver:
    """Of Triton's, of a GPU that tensors of the CPU lie on."""

    def get_current_device(self) -> int:
        return -1  # as their get_device() says

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class _StandInKernel:
    """What Triton has compiled, without a program: what is left of a launch is the host's."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def runner(*arguments: Any, stream: int) -> None:
            metadata = self.launch_metadata(grid, stream, *arguments)
            self.run(*grid, stream, self.function, self.packed_metadata, metadata, *arguments)

        return runner


def _compile_nothing(
    kernel: Any, key: str, signature: Any, device: int, *rest: Any
) -> _StandInKernel:
    compiled = kernel.device_caches[device][0][key] = _StandInKernel()
    return compiled


@contextmanager
def _launching_nothing() -> Iterator[None]:
    """Inside, Triton finds and binds what it would launch, and neither compiles nor launches it."""
    from triton.runtime import JITFunction, driver

    from rerank_fast.ops.triton import launcher

    with (
        mock.patch.object(driver, "_active", _StandInDriver()),
        mock.patch.object(JITFunction, "_do_compile", _compile_nothing),
        mock.patch.dict(launcher._known, clear=True),
        # Heads of one number lie closer than those of a model.
        mock.patch.object(launcher, "_ALIGNMENT", 1),
    ):
        yield


@functools.cache
def _wide(shape: torch.Size) -> Tensor:
    return torch.zeros(shape)


def _wide_product(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Stands for a product of 16-bit rows that comes out in fp32, which the CPU has not."""
    return torch.mm(_wide(grad.shape).t(), _wide(x.shape))


@contextmanager
def stubbed_kernels() -> Iterator[None]:
    """Inside, tensors of the CPU take a GPU's path, whose kernels are not launched; and products
    don't go through oneDNN, which takes longer for a tiny one than a GPU's library to launch it."""
    patches: list[tuple[Any, str, Any]] = [
        (registry.Backends, "_best", lambda backends, tensor, facts: "triton"),
        (guard, "refusal", lambda device: ""),
        *(
            (module, "triton_serves", lambda device, dtype: True)
            for module in (encoder, bucket_encoder, ready_layers, layer_kernels)
        ),
        (linear, "_onednn_multiplies", lambda dtype: False),
        (gradients, "_widens", lambda grad, dtype: dtype == torch.float32),
        (linear, "product_weight_gradient", _wide_product),
        # Cumulative lengths are read where they lie on the CPU alone.
        (ragged, "check_ends", lambda name, ends, num_tokens: None),
        (ragged, "check_offsets", lambda offsets, num_documents: None),
    ]
    with ExitStack() as stack:
        if registry.HAS_TRITON:
            stack.enter_context(_launching_nothing())
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        for place, name, stub in patches:
            stack.enter_context(mock.patch.object(place, name, stub))
        yield


class _StandInGraph:
    """A captured graph whose replay does nothing, but that what was captured is counted."""

    def __init__(self) -> None:
        self.replay: Callable[[], object] = lambda: None


class _StandInStream:
    def wait_stream(self, other: _StandInStream) -> None:
        return None


@contextmanager
def standing_in_for_graphs(counts: DeviceCounts | None = None) -> Iterator[None]:
    """Inside, tensors without a GPU are captured and replayed as the package does on one: what
    belongs to CUDA alone, the capture and the replay, is stood in for. Capturing runs what is to be
    captured; replaying does not.

    Args:
        counts: are told at each replay what was counted at its capture.
    """

    @contextmanager
    def capture(graph: _StandInGraph, pool: Any = None, **options: Any) -> Iterator[None]:
        if counts is None:
            yield
            return
        with counts.capturing() as captured:
            yield
        graph.replay = functools.partial(counts.replay, captured)

    def seed(config: Any, device: torch.device) -> int | None:
        return config.seed if config.cuda_graphs else None

    with ExitStack() as stack:
        for place, name, stub in (
            (torch.cuda, "CUDAGraph", _StandInGraph),
            (torch.cuda, "graph", capture),
            (torch.cuda, "Stream", lambda device: _StandInStream()),
            (torch.cuda, "current_stream", lambda device: _StandInStream()),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            (backward, "_graph_seed", seed),  # which refuses what is no GPU, as these do
            (cross_encoder, "has_graphs", lambda device: True),
            (pretrained, "has_graphs", lambda device: True),
        ):
            stack.enter_context(mock.patch.object(place, name, stub))
        yield

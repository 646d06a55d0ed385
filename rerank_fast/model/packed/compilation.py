"""torch.compile of packed layers: a few graphs for all layers, lengths and steps."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from rerank_fast.model.packed.layers import run_layer
from rerank_fast.ops.registry import HAS_TRITON

Compiler = str | Callable[..., Any]  # a backend of torch.compile

# A layer has a graph with gradients and one without, in training and in evaluation; ModernBERT's
# layers are of four kinds. torch's own limit of 8 would leave the rest eager.
_MAX_GRAPHS = 64


@functools.cache
def compiled_layer(compiler: Compiler) -> Any:
    """run_layer, compiled when it is first called; one for all models, whose layers share what fits
    them.

    Weights are inputs of the graphs, numbers of tokens and pairs and seeds of dropout are symbols
    in them.
    """
    options: dict[str, Any] = {"dynamic": True, "backend": compiler}
    if compiler == "inductor":
        # Dropout between the ops draws what it draws eagerly.
        options["options"] = {"fallback_random": True}
    if (
        "recompile_limit" in inspect.signature(torch.compile).parameters
    ):  # newer than the oldest torch that serves
        options["recompile_limit"] = _MAX_GRAPHS
    return torch.compile(run_layer, **options)


def check_compiler(device: torch.device) -> None:
    """Whether inductor can build kernels for a device.

    Raises:
        ValueError: it can't, and what is missing.
    """
    if device.type == "cpu":
        name = os.environ.get("CXX", "g++")
        if shutil.which(name) is None:
            raise ValueError(
                f"torch.compile needs a C++ compiler on a CPU, and there is no {name}; install "
                "one (Debian and Ubuntu: apt-get install g++), name another in CXX, or leave "
                "compilation off"
            )
    elif not HAS_TRITON:
        raise ValueError(
            f"torch.compile needs Triton on {device}: pip install triton, or leave compilation off"
        )

"""The shipped launch config of a case or, with RERANK_FAST_AUTOTUNE=1, the fastest of a few around
it.

The variable is read when this file is imported. A kernel is then timed on the first batch of each
case: that waits for the GPU and can't be captured in a graph. Triton keeps the choice on disk. With
one config a kernel gives the same bits every time, with another it may give others: tuned results
are repeatable where the choice is the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import triton

from rerank_fast.ops.triton import guard
from rerank_fast.ops.triton.launcher import Config

ENABLED = os.environ.get("RERANK_FAST_AUTOTUNE") == "1"


def choose(
    kernel: Any, shipped: Config, others: Iterable[dict[str, Any]], key: tuple[str, ...]
) -> tuple[Any, Config]:
    """What to launch and the config to give it: kernel and shipped, or a tuner of its own and what
    is left.

    others: what each further candidate changes of the shipped config, which is the first. key:
    arguments whose
    values make another case. The kernel must overwrite its outputs: it runs many times.
    """
    if not ENABLED:
        return kernel, shipped
    candidates = tuple(tuple((shipped | other).items()) for other in ({}, *others))
    rest = Config({name: value for name, value in shipped.items() if not _is_tuned(name)})
    return _tuner(kernel, candidates, key), rest


def _is_tuned(name: str) -> bool:
    return name.isupper() or name in ("num_warps", "num_stages", "maxnreg")


@functools.cache
def _tuner(
    kernel: Any, candidates: tuple[tuple[tuple[str, Any], ...], ...], key: tuple[str, ...]
) -> Any:
    configs = []
    for candidate in candidates:
        blocks = {name: value for name, value in candidate if name.isupper()}
        options = {
            name: value for name, value in candidate if not name.isupper() and _is_tuned(name)
        }
        configs.append(triton.Config(blocks, **options))
    interpreted = guard.interpreted()
    return triton.autotune(
        configs,
        key=list(key),
        do_bench=_run_once if interpreted else None,
        cache_results=not interpreted,
    )(kernel)


def _run_once(call: Any, quantiles: tuple[float, ...]) -> list[float]:
    """In the interpreter times say nothing: every candidate runs, and the shipped one, the first,
    stays.
    """
    call()
    return [0.0] * len(quantiles)

"""Launchers that meta tensors reach as ops: what a step launches is seen without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("rerank_fast", "FRAGMENT")


def launcher(
    *, mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function that allocates results and launches kernels, which it leaves out for
    meta tensors.

    Those, of which the first argument must be one, reach it as an op of its name; others at once.
    Its annotations are the op's schema.

    Args:
        mutates: names of arguments that are written.
    """

    def declare(run: Callable[..., Any]) -> Callable[..., Any]:
        name = run.__name__
        schema = torch.library.infer_schema(run, mutates_args=mutates)
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        op = getattr(torch.ops.rerank_fast, name).default

        @functools.wraps(run)
        def call(*arguments: Any) -> Any:
            return (op if arguments[0].is_meta else run)(*arguments)

        return call

    return declare

"""Settings that every test shares."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

# Before torch is imported: processes of pytest-xdist share the processors.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = max((os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))

import pytest
import torch
from hypothesis import settings

from rerank_fast.ops import registry

# Before transformers or datasets are imported: tests never ask a hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inductor's cache takes graphs that were compiled under another ATEN_CPU_CAPABILITY for this one's;
# they write past their outputs. torch's own folder is kept for what users compiled.
_vectors = torch.backends.cpu.get_cpu_capability().replace(" ", "-").lower()
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir(), f"rerank_fast_tests_{_vectors}_{os.getuid()}")),
)
if not torch.cuda.is_available():
    # Read when the kernels are imported: without a GPU they run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if registry.HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpretedFunction

    def _call(self: Any, *arguments: Any, **options: Any) -> Any:
        """Of a function of a kernel's: the interpreter makes the language its own in every such
        call, a third of its time, where the launch has done so and a module's first call does.
        """
        if self.fn.__module__ in _known:
            return self.rewrite()(*arguments, **options)
        _known.add(self.fn.__module__)
        return _first_call(self, *arguments, **options)

    _known: set[str] = set()
    _first_call = InterpretedFunction.__call__
    InterpretedFunction.__call__ = _call

# CI draws the same examples every time; everywhere else new ones are found.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes runs on request: pytest -m slow."""
    if config.option.markexpr:
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: -m slow"))

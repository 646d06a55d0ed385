"""Settings that every test shares."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before torch is imported: processes of pytest-xdist share the processors.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _share = max((os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))

import pytest
import torch
from hypothesis import settings

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

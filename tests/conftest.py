"""Settings that every test shares."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Before transformers or datasets are imported: tests never ask a hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Read when the kernels are imported: without a GPU they run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# CI draws the same examples every time; everywhere else new ones are found.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

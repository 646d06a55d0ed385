"""Settings that every test shares."""

from __future__ import annotations

import os

# Before transformers or datasets are imported: tests never ask a hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

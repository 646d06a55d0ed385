"""Whole model directories, and a copy of one to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rerank_fast import CrossEncoder
from tests.model_factory import make_tiny_bert, make_tiny_qwen3


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    CrossEncoder(make_tiny_bert(root / "bert"), device="cpu").save_pretrained(root / "whole")
    return root / "whole"


@pytest.fixture(scope="module")
def whole_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    CrossEncoder(make_tiny_qwen3(root / "qwen3"), device="cpu").save_pretrained(root / "whole")
    return root / "whole"


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))

"""Directories of a PEFT adapter alone."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rerank_fast import CrossEncoder
from tests.model.storage.damage import PAIRS, edit, refused
from tests.model_factory import make_tiny_bert


@pytest.fixture(params=[True, False], ids=["classifier", "bare encoder"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """An adapter that brings its head, and the scores of the merged model."""
    base = make_tiny_bert(tmp_path / "base", head=request.param)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=4,
        target_modules=["query", "value"],
        modules_to_save=["classifier", "pooler"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer(
        [q for q, _ in PAIRS], [d for _, d in PAIRS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        scores = adapted.merge_and_unload().eval()(**inputs).logits[:, 0].sigmoid().numpy()
    return tmp_path / "adapter", scores


@pytest.mark.parametrize("tokenizer", [False, True])
def test_it_opens_on_its_base(
    adapter: tuple[Path, np.ndarray],
    tokenizer: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    directory, expected = adapter
    if tokenizer:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tmp_path / "base" / file, directory / file)
    model = CrossEncoder(directory, device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    assert "no trained score head" not in caplog.text
    assert not any("lora" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "merged")
    again = CrossEncoder(tmp_path / "merged", device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fault", ["no base", "base is missing", "pickled", "no peft", "another model's"]
)
def test_why_it_does_not_open(
    adapter: tuple[Path, np.ndarray], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory, _ = adapter
    message = f"holds a PEFT adapter of {tmp_path / 'base'} "
    if fault == "no base":
        edit(directory, "adapter_config.json", base_model_name_or_path=None)
        message = "holds a PEFT adapter and no model, and its adapter_config.json names none"
    elif fault == "base is missing":
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(ValueError, match=r"model directory .*base does not exist"):
            CrossEncoder(directory, device="cpu")
        return
    elif fault == "pickled":
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    elif fault == "no peft":
        original = builtins.__import__

        def without(name: str, *rest: object) -> object:
            if name == "peft":
                raise ImportError(name)
            return original(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
        message += r"and no model: pip install 'rerank-fast\[lora\]' opens it"
    else:
        edit(directory, "adapter_config.json", target_modules=["no_such"])
        message += "and no model; it does not fit there"
    refused(directory, message)
    assert json.loads((directory / "adapter_config.json").read_text())

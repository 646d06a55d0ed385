"""PEFT adapters: in a directory of their own, beside a model, and in a model that is saved."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rerank_fast import CrossEncoder
from tests.model.modular_factory import ettin, make_peer
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
        message += r"and no model: model directory .*base does not exist"
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


KINDS: dict[str, PeftConfig] = {
    "dora": LoraConfig(r=4, target_modules=["query"], use_dora=True, init_lora_weights=False),
    "biases": LoraConfig(r=4, target_modules=["query"], bias="lora_only"),
    "embeddings": LoraConfig(
        r=4, target_modules=["query", "word_embeddings"], init_lora_weights=False
    ),
    "tokens": LoraConfig(
        r=4, target_modules=["query"], trainable_token_indices={"word_embeddings": [3, 4]}
    ),
    "ia3": IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
}


def save_adapter(directory: Path, config: PeftConfig) -> np.ndarray:
    """An adapter of the model in "base" beside it, and the scores with it."""
    base = make_tiny_bert(directory / "base")
    config.task_type = "SEQ_CLS"  # type: ignore[assignment]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(directory / "adapter")
    inputs = AutoTokenizer.from_pretrained(base)(
        [q for q, _ in PAIRS], [d for _, d in PAIRS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        return adapted.eval()(**inputs).logits[:, 0].sigmoid().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_merged_opens(kind: str, tmp_path: Path):
    expected = save_adapter(tmp_path, KINDS[kind])
    model = CrossEncoder(tmp_path / "adapter", device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)


def test_a_prompts_embeddings_can_not(tmp_path: Path):
    save_adapter(tmp_path, PromptTuningConfig(num_virtual_tokens=3))
    refused(
        tmp_path / "adapter", "expected an adapter that can be merged, as LoRA, got .*PROMPT_TU"
    )


@pytest.mark.parametrize("fault", ["lacks one", "one too many", "NaN"])
def test_weights_of_an_adapter(adapter: tuple[Path, np.ndarray], fault: str):
    directory, _ = adapter
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if ".lora_B." in name)
    short = name.removeprefix("base_model.model.")
    if fault == "lacks one":
        del tensors[name]
        message = f"it lacks the weight {short}"
    elif fault == "one too many":
        tensors[name.replace("layer.0", "layer.9")] = tensors[name].clone()
        message = f"the model has no weight {short.replace('layer.0', 'layer.9')}"
    else:
        tensors[name][:] = torch.nan
        message = f"the weight {short.partition('.lora_B')[0]}.weight has a value that is NaN"
    save_file(tensors, file, metadata={"format": "pt"})
    refused(directory, message)


@pytest.mark.parametrize("beside", [False, True])
def test_a_model_saved_where_its_adapter_lay_has_it_once(
    adapter: tuple[Path, np.ndarray], beside: bool, tmp_path: Path
):
    directory, expected = adapter
    if beside:
        for file in (tmp_path / "base").iterdir():
            shutil.copy(file, directory / file.name)
    model = CrossEncoder(directory, device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    assert not any("lora" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="already holds a model"):
        model.save_pretrained(directory)
    model.save_pretrained(directory, overwrite=True)
    again = CrossEncoder(directory, device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["in place", "around the model", "around the encoder"])
def test_adapters_in_a_model_are_saved_merged(place: str, tmp_path: Path):
    make_peer(tmp_path, ettin("mean"), "bert")
    model = CrossEncoder(tmp_path / "model", device="cpu")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    inner = model.model
    if place == "in place":
        inject_adapter_in_model(config, inner)
    elif place == "around the model":
        model.model = get_peft_model(inner, config)
    else:
        inner.encoder = get_peft_model(inner.encoder, config)
    expected, names = model.predict(PAIRS), list(model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert list(model.state_dict()) == names
    for kind in (CrossEncoder, PeerCrossEncoder):
        scores = kind(str(tmp_path / "saved"), device="cpu").predict(PAIRS)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "saved" / "adapter_config.json").exists()

"""A head of the other kind: equal scores, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.modules import Dense
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from torch import nn
from transformers import AutoModelForSequenceClassification

from rerank_fast import CrossEncoder
from rerank_fast.cli import main
from rerank_fast.model.conversion import convert_head
from tests.model.modular_factory import (
    HEADS,
    PAIRS,
    WIDTH,
    ettin,
    make_encoder,
    make_peer,
    score,
    spread,
)
from tests.model.storage.damage import edit
from tests.model_factory import make_tiny_qwen3

CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "distilbert": ("distilbert", {}),
    "modernbert": ("modernbert", {}),
    "modernbert mean": ("modernbert", {"classifier_pooling": "mean", "classifier_bias": True}),
    "modernbert biased norm": ("modernbert", {"norm_bias": True, "classifier_activation": "silu"}),
    "a decoder": ("qwen3", {}),
    "deberta": ("deberta", {"pooler_dropout": 0.15}),
    "eurobert": ("eurobert", {"classifier_pooling": "bos"}),  # which calls its first token bos
}


def make_classifier(name: str, directory: Path) -> Path:
    encoder, options = CLASSIFIERS[name]
    make_encoder(encoder, directory)
    config = transformers.AutoConfig.from_pretrained(directory, num_labels=1, **options)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    spread(model)
    model.save_pretrained(directory)
    return directory


def convert(source: Path, output: Path, kind: str) -> int:
    return main(["convert", "--model", str(source), "--output", str(output), "--head", kind])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifiers_head_as_modules_and_back(name: str, tmp_path: Path):
    model = CrossEncoder(make_classifier(name, tmp_path / "model"), device="cpu")
    expected = model.predict(PAIRS)
    assert convert(tmp_path / "model", tmp_path / "modular", "modular") == 0
    for opened in (
        CrossEncoder(tmp_path / "modular", device="cpu"),
        PeerCrossEncoder(str(tmp_path / "modular")),
    ):
        np.testing.assert_allclose(opened.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert convert(tmp_path / "modular", tmp_path / "back", "classification") == 0
    again = CrossEncoder(tmp_path / "back", device="cpu")
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert again.model.state_dict().keys() == model.model.state_dict().keys()
    assert type(again.model) is type(model.model)
    pooling = "classifier_pooling"
    assert getattr(again.model.config, pooling, "") == getattr(model.model.config, pooling, "")
    assert dropouts(again.model) == dropouts(model.model)


def dropouts(model: Any) -> list[float]:
    """Of all but the encoder's layers, whose config is kept as a whole."""
    return [
        one.p
        for name, one in model.named_modules()
        if type(one) is nn.Dropout and "layer" not in name
    ]


@pytest.mark.parametrize(
    ("encoder", "activation", "name"),
    [("distilbert", nn.ReLU(), "seq_classif_dropout"), ("deberta", nn.Tanh(), "pooler_dropout")],
)
def test_the_dropout_and_activation_of_modules_are_the_classifiers(
    encoder: str, activation: nn.Module, name: str, tmp_path: Path
):
    dense = Dense(WIDTH, WIDTH, activation_function=activation)
    head = [Pooling(WIDTH, "cls"), Dropout(0.35), dense, Dropout(0.35), score()]
    peer = make_peer(tmp_path, head, encoder)
    assert convert(tmp_path / "model", tmp_path / "out", "classification") == 0
    model = CrossEncoder(tmp_path / "out", device="cpu")
    np.testing.assert_allclose(model.predict(PAIRS), peer.predict(PAIRS), rtol=1e-5, atol=1e-5)
    assert getattr(model.model.config, name) == 0.35


def test_a_bf16_decoders_rotary_positions_are_not_rounded(tmp_path: Path):
    peer = make_peer(tmp_path, [Pooling(WIDTH, "lasttoken"), score(bias=False)], "qwen3")
    peer.to(torch.bfloat16).save_pretrained(str(tmp_path / "model"))
    model = CrossEncoder(tmp_path / "model", device="cpu")
    before = dict(model.model.named_buffers())
    assert convert_head(model, "classification") == 0
    after = dict(model.model.named_buffers())
    for name, value in before.items():
        torch.testing.assert_close(after[name.replace("encoder.", "model.")], value, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_an_ettin_rerankers_modules_as_a_classifier(mode: str, tmp_path: Path):
    peer = make_peer(tmp_path, ettin(mode))
    nn.init.zeros_(peer[3].norm.bias)  # ModernBERT's norms have none
    peer.save_pretrained(str(tmp_path / "model"))
    assert convert(tmp_path / "model", tmp_path / "out", "classification") == 0
    model = CrossEncoder(tmp_path / "out", device="cpu")
    assert type(model.model).__name__ == "ModernBertForSequenceClassification"
    np.testing.assert_allclose(model.predict(PAIRS), peer.predict(PAIRS), rtol=1e-5, atol=1e-5)
    assert model.model.config.classifier_pooling == mode


REFUSED: dict[str, tuple[str, Callable[[], list[nn.Module]], str]] = {
    "norm's bias": (
        "modernbert",
        lambda: ettin("cls"),
        "has a bias, for which the other kind has no place",
    ),
    "pooling": (
        "bert",
        lambda: [Pooling(WIDTH, "mean"), Dense(WIDTH, WIDTH), score()],
        "reads its tokens by cls",
    ),
    "activation": (
        "bert",
        lambda: [
            Pooling(WIDTH, "cls"),
            Dense(WIDTH, WIDTH, activation_function=nn.GELU()),
            score(),
        ],
        "has the activation Tanh",
    ),
    "norm": (
        "bert",
        lambda: [Pooling(WIDTH, "cls"), Dense(WIDTH, WIDTH), LayerNorm(WIDTH), score()],
        "has no norm layer",
    ),
    "width": (
        "bert",
        lambda: [Pooling(WIDTH, "cls"), Dense(WIDTH, 16), score(16)],
        "a layer of the head is",
    ),
    "residual": ("bert", HEADS["residual"], "are no sequence classifier's head"),
    "normalized": ("modernbert", HEADS["normalized"], "are no sequence classifier's head"),
    "two modes": (
        "modernbert",
        lambda: ettin(("cls", "mean")),
        "are no sequence classifier's head",
    ),
    "a pooling that is not in its config": (
        "modernbert",
        lambda: [Pooling(WIDTH, "max"), *ettin("cls")[1:]],
        "classifier_pooling of transformers' modernbert can't be 'max'",
    ),
    "a prompt that is left out": (
        "bert",
        lambda: [Pooling(WIDTH, "cls", include_prompt=False), Dense(WIDTH, WIDTH), score()],
        "leaves out a prompt's tokens",
    ),
    "no dense layer": (
        "bert",
        lambda: [Pooling(WIDTH, "cls"), score()],
        "has a dense layer, and the modules have none",
    ),
    "a decoder's first token": (
        "qwen3",
        lambda: [Pooling(WIDTH, "cls"), score(bias=False)],
        "reads its tokens by lasttoken, and the modules by cls",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_modules_that_are_no_classifiers_head(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    encoder, head, message = REFUSED[name]
    make_peer(tmp_path, head(), encoder)
    assert convert(tmp_path / "model", tmp_path / "out", "classification") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_layer_that_is_not_the_last(tmp_path: Path, capsys: pytest.CaptureFixture):
    make_peer(tmp_path, ettin(), "bert")
    text = {"method": "forward", "method_output_name": ["hidden_states", 1]}
    edit(tmp_path / "model", "sentence_bert_config.json", modality_config={"text": text})
    assert convert(tmp_path / "model", tmp_path / "out", "classification") == 2
    assert "the modules read the encoder's hidden_states.1, and a" in capsys.readouterr().err


def test_heads_that_are_that_kind_already_or_have_no_like(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    make_peer(tmp_path, ettin())
    make_tiny_qwen3(tmp_path / "qwen3")
    make_classifier("bert", tmp_path / "bert")
    for source, kind, message in (
        ("model", "modular", "has a modular head already"),
        ("bert", "classification", "has a classification head already"),
        ("qwen3", "modular", "its answers to a prompt, and with another"),
    ):
        assert convert(tmp_path / source, tmp_path / "out", kind) == 2
        assert message in capsys.readouterr().err

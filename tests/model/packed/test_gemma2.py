"""Gemma 2: what of it is not as in other families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from transformers import Gemma2Config, Gemma2ForSequenceClassification

from rerank_fast import CrossEncoder, score
from rerank_fast.model.packed.architectures import find_architecture
from tests.model.packed.test_encoder import (
    GEMMA2,
    LENGTHS,
    PLANS,
    gradients,
    make_model,
    make_tokens,
    packed_scores,
    padded_scores,
    relative_errors,
)
from tests.model_factory import make_tiny_gemma2

PAIRS = [("what is the panda", doc) for doc in ("a kind of bear", "rain and wind", "", "sea " * 40)]


def test_saved_and_opened_again_by_both(tmp_path: Path) -> None:
    path = make_tiny_gemma2(tmp_path / "made")
    model = CrossEncoder(path, device="cpu")
    assert not model.prepare(model.tokenize(PAIRS)).padded
    expected = PeerCrossEncoder(str(path), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=1e-5)
    score(model.train().prepare(model.tokenize(PAIRS))).sum().backward()
    model.eval().save_pretrained(tmp_path / "saved")
    for kind in (CrossEncoder, PeerCrossEncoder):
        again = kind(str(tmp_path / "saved"), device="cpu")
        np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-5)


def test_layers_are_as_the_config_says() -> None:
    layers = find_architecture(make_model("gemma2")).layers
    assert [layer.window for layer in layers] == [(7, 0), None, (7, 0)]
    assert {layer.softcap for layer in layers} == {3.0}
    assert {layer.scale for layer in layers} == {10**-0.5}


@pytest.mark.parametrize("softcap", [50.0, 0.5])
def test_heads_of_256_as_published(softcap: float) -> None:
    """Wider than all heads' share of the model, two of them to one of keys."""
    shape = {**GEMMA2, "head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"query_pre_attn_scalar": 256, "attn_logit_softcapping": softcap}
    torch.manual_seed(7)
    model = Gemma2ForSequenceClassification(Gemma2Config(**shape)).eval()
    tokens, upstream = make_tokens(LENGTHS, types=False), torch.randn(len(LENGTHS))
    expected = padded_scores(model, tokens)
    expected_gradients = gradients(model, expected, upstream)
    actual = packed_scores(model, tokens, PLANS["several"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    errors = relative_errors(gradients(model, actual, upstream), expected_gradients)
    assert max(errors.values()) < 1e-3, errors

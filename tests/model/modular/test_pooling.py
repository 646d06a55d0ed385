"""Pooling beside sentence-transformers': each mode, words with weights, prompts left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.sentence_transformer.modules import WordWeights
from tokenizers.processors import TemplateProcessing
from torch import nn

from rerank_fast import CrossEncoder
from tests.model.modular_factory import PAIRS, check_both_ways, check_gradients, ettin, make_peer

MODES = [
    "cls",
    "mean",
    "max",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    ("cls", "mean", "lasttoken"),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pooling_in_each_of_its_modes(mode: Any, tmp_path: Path):
    check_gradients(check_both_ways(make_peer(tmp_path, ettin(mode)), tmp_path, packed=True))


def test_an_older_pooling_config_opens(tmp_path: Path):
    peer = make_peer(tmp_path, ettin(("max", "mean")))
    file = tmp_path / "model" / "1_Pooling" / "config.json"
    older = {
        "word_embedding_dimension": 32,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": True,
    }
    file.write_text(json.dumps(older | {"pooling_mode_cls_token": False}))
    scores = CrossEncoder(tmp_path / "model", device="cpu").predict(PAIRS)
    np.testing.assert_allclose(scores, peer.predict(PAIRS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pooling_of_weighted_words(mode: Any, tmp_path: Path):
    words = [f"w{n}" for n in range(128)]
    weights = {word: 0.1 + n * 37 % 11 / 7 for n, word in enumerate(words)}
    make_peer(tmp_path, [WordWeights(words, weights), *ettin(mode)])
    path = str(tmp_path / "model")  # which has the weights of words in its config
    peer = PeerCrossEncoder(path, activation_fn=nn.Identity(), device="cpu")
    check_both_ways(peer, tmp_path, packed=False)


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("encoder", ["modernbert", "qwen3"])
def test_pooling_without_the_tokens_of_a_prompt(encoder: str, mode: str, tmp_path: Path):
    head = ettin(mode)
    head[0].include_prompt = False  # type: ignore[assignment]
    peer = make_peer(tmp_path, head, encoder)
    model = CrossEncoder(tmp_path / "model", device="cpu")
    for prompt in (None, "is it of the sea: "):
        expected = peer.predict(PAIRS, prompt=prompt)
        found = model.predict(PAIRS, prompt=prompt, batch_size=2)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    head[0].include_prompt = True  # type: ignore[assignment]
    differs = np.abs(peer.predict(PAIRS, prompt=prompt) - expected).max() > 1e-4
    assert differs or mode == "lasttoken"


@pytest.mark.parametrize("prompt", ["the sea", "is it of the sea " * 30], ids=["short", "long"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "mode", ["cls", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
)
def test_a_prompt_that_leaves_no_other_token(mode: str, special: bool, prompt: str, tmp_path: Path):
    head = ettin(mode)
    head[0].include_prompt = False  # type: ignore[assignment]
    peer = make_peer(tmp_path, head, "qwen3")
    if not special:
        processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        peer.tokenizer.backend_tokenizer.post_processor = processor
        peer.tokenizer.save_pretrained(str(tmp_path / "model"))
    pairs = [("", ""), *PAIRS]
    expected = peer.predict(pairs, prompt=prompt)
    found = CrossEncoder(tmp_path / "model", device="cpu").predict(pairs, prompt=prompt)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

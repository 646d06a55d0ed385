"""A pair has one score, whatever it is scored with, from padded models of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rerank_fast import CrossEncoder
from tests.model_factory import SIZES, make_tokenizer

PAIRS = [
    ("what is a panda", "a bear"),
    ("rain", "the sea and the wind " * 4),
    ("sun [SEP]", "the [SEP] sea"),
    ("the rain", "a bear"),
]
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
POSITIONS = {"max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    # positions from the left
    "Albert": {**POSITIONS, "embedding_size": 32},
    "Deberta": POSITIONS,
    "GPT2": {"n_positions": 64},
    "GPTNeo": {**POSITIONS, "num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "XLM": {**POSITIONS, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
    # the last place is read
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    # the last token that ends a text is read, of which each row must have as many
    "T5": {**T5, "decoder_start_token_id": 0},
    # padding is read
    "ConvBert": {**POSITIONS, "embedding_size": 32},
    "FNet": POSITIONS,
    "Nystromformer": {**POSITIONS, "segment_means_seq_len": 64},
    "Yoso": POSITIONS,
}


def save(model: Any, directory: Path, tokenizer: Any) -> Path:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_padded_tokenizer(side: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.padding_side, tokenizer.eos_token = side, "[SEP]"
    return tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_classifiers(name: str, side: str, tmp_path: Path):
    tokenizer = make_padded_tokenizer(side)
    sizes = {**SIZES, **TOKENS, "vocab_size": len(tokenizer), **FAMILIES[name]}
    config = getattr(transformers, f"{name}Config")(**sizes)
    made = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model = CrossEncoder(save(made, tmp_path / "model", tokenizer), device="cpu")
    with torch.no_grad():  # by the Hugging Face model itself
        alone = [
            float(model.model(input_ids=torch.from_numpy(row.input_ids)[None].long()).logits)
            for row in (model.tokenize([pair]) for pair in PAIRS)
        ]
    assert np.ptp(alone) > 1e-3
    scores = model.predict(PAIRS, activation_fn=nn.Identity())
    np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["BioGpt", "GPTNeo"])
def test_language_models_with_learned_positions(name: str, tmp_path: Path):
    tokenizer = make_padded_tokenizer("right")
    tokenizer.chat_template = "".join(
        f"{{{{ (messages | selectattr('role', 'eq', '{role}') | first).content }}}} "
        for role in ("query", "document")
    )
    sizes = {**SIZES, **TOKENS, "vocab_size": len(tokenizer), **FAMILIES.get(name, POSITIONS)}
    config = getattr(transformers, f"{name}Config")(**sizes)
    made = getattr(transformers, f"{name}ForCausalLM")(config)
    model = CrossEncoder(save(made, tmp_path / "model", tokenizer), device="cpu")
    alone = [model.predict(pair, activation_fn=nn.Identity()) for pair in PAIRS]
    scores = model.predict(PAIRS, activation_fn=nn.Identity())
    np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-5)


def test_a_padding_token_beyond_the_embeddings_is_not_the_models(tmp_path: Path):
    """transformers gives a Qwen tokenizer without one <|endoftext|>."""
    tokenizer = make_padded_tokenizer("right")
    tokenizer.pad_token = None
    config = transformers.Qwen2Config(
        **{**SIZES, **TOKENS, "vocab_size": len(tokenizer), "pad_token_id": None},
        num_key_value_heads=2,
    )
    made = transformers.Qwen2ForSequenceClassification(config)
    model = CrossEncoder(save(made, tmp_path / "model", tokenizer), device="cpu")
    assert model.model.config.pad_token_id is None
    alone = [model.predict(pair) for pair in PAIRS]
    np.testing.assert_allclose(model.predict(PAIRS), alone, rtol=1e-5)
    padded = model.forward(model.preprocess(PAIRS))["scores"].sigmoid().detach()
    np.testing.assert_allclose(padded, alone, rtol=1e-4)

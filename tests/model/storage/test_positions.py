"""Models with and without a limit of length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rerank_fast import CrossEncoder
from tests.model_factory import SIZES, make_tokenizer

LONG = [("what is a panda", "bear " * 300), ("rain", "the sea")]
ROBERTA = {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 2}
# Longest text of each, None for no limit.
FAMILIES: dict[str, tuple[dict[str, Any], int | None]] = {
    "Bert": ({"max_position_embeddings": 64}, 64),
    "Roberta": (ROBERTA, 64),
    "XLMRobertaXL": (ROBERTA, 64),
    "Xmod": ({**ROBERTA, "languages": ["en_XX"], "default_language": "en_XX"}, 64),
    "Data2VecText": (ROBERTA, 64),
    "RobertaPreLayerNorm": (ROBERTA, 64),
    "IBert": (ROBERTA, 64),
    "Luke": ({**ROBERTA, "entity_vocab_size": 8, "entity_emb_size": 8}, 64),
    "Longformer": ({**ROBERTA, "attention_window": 8}, 64),
    "Esm": ({**ROBERTA, "position_embedding_type": "absolute", "mask_token_id": 4}, 64),
    "MPNet": (ROBERTA, 64),
    "Camembert": (ROBERTA, 64),
    "BioGpt": ({"max_position_embeddings": 64}, 64),
    "GPT2": ({"n_positions": 64}, 64),
    "OPT": ({"max_position_embeddings": 64, "word_embed_proj_dim": 32, "ffn_dim": 64}, 64),
    "Bloom": ({}, None),
    "T5": (
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        None,
    ),
    "XLNet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}, None),
}


def make(name: str, directory: Path) -> CrossEncoder:
    options, _ = FAMILIES[name]
    # As one whose files give no limit, with a padding token of the model's.
    tokenizer = make_tokenizer(model_max_length=int(1e30))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "eos_token_id": 3,
        "bos_token_id": 2,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return CrossEncoder(directory, device="cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pair_is_as_long_as_the_positions_go(name: str, tmp_path: Path):
    model = make(name, tmp_path / "model")
    longest = FAMILIES[name][1]
    assert model.max_length == longest
    scores = model.predict(LONG)
    assert np.isfinite(scores).all()
    lengths = model.tokenize(LONG).lengths
    if longest is None:
        assert lengths[0] > 300
        assert not model.truncated_pairs
        return
    assert lengths[0] == longest
    assert model.truncated_pairs == {longest: 2}
    with pytest.raises(
        ValueError, match=f"max_length is {longest + 1}, but .* has {longest} positions"
    ):
        model.max_length = longest + 1
    beyond = torch.full((1, longest + 1), 5)
    if name != "Longformer":  # pads by itself, to whole windows
        with (
            pytest.raises((IndexError, RuntimeError)),
            torch.no_grad(),
        ):  # one more is too much: none is given away
            model.model(input_ids=beyond, attention_mask=torch.ones_like(beyond))


def test_no_limit_is_saved_as_none(tmp_path: Path):
    model = make("Bloom", tmp_path / "model")
    scores = model.predict(LONG)
    model.save_pretrained(tmp_path / "again")
    assert "any number of tokens" in (tmp_path / "again" / "README.md").read_text()
    again = CrossEncoder(tmp_path / "again", device="cpu")
    assert again.max_length is None
    np.testing.assert_array_equal(again.predict(LONG), scores)
    again.max_length = 16
    assert again.tokenize(LONG).lengths.max() == 16
    again.max_length = None
    assert again.tokenize(LONG).lengths.max() > 300


def test_positions_of_somebodys_own_code_are_those_that_surely_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    make("Bert", tmp_path / "model")
    monkeypatch.setattr(
        transformers.BertForSequenceClassification, "__module__", "somebodys.modeling"
    )
    assert CrossEncoder(tmp_path / "model", device="cpu").max_length == 63
    assert "of its 64 positions 63 are used" in caplog.text

"""Models that run padded: with and without a padding token, and pairs of no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from rerank_fast import CrossEncoder, Trainer, TrainingConfig
from rerank_fast.model.preparation import Preparer
from rerank_fast.model.tokens.packing import TokenizedPairs
from tests.model_factory import SIZES, make_tiny_bert, make_tokenizer

PAIRS = [
    ("what is a panda", "a bear"),
    ("rain", "the sea and the wind " * 4),
    ("rain", ""),
    ("sun", "the sea"),
]
GEMMA = {"num_key_value_heads": 2, "head_dim": 8}


def make_decoder(
    name: str,
    directory: Path,
    *,
    tokenizer_pads: bool = False,
    config_pads: int | None = None,
    special: bool = False,
) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if not special:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A $B"
        )
    tokenizer.eos_token = "[SEP]"
    if not tokenizer_pads:
        tokenizer.pad_token = None
    options = GEMMA if name in ("Gemma", "Mistral", "Llama") else {}
    sizes = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "pad_token_id": config_pads,
    }
    config = getattr(transformers, f"{name}Config")(
        **sizes, eos_token_id=3, bos_token_id=2, **options
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def one_by_one(model: CrossEncoder) -> list[float]:
    """Scores by the Hugging Face model itself, of a batch of one each."""
    rows = [model.tokenize([pair]) for pair in PAIRS]
    with torch.no_grad():
        return [
            float(
                model.model(input_ids=torch.from_numpy(row.input_ids)[None].long()).logits.sigmoid()
            )
            for row in rows
        ]


@pytest.mark.parametrize("name", ["GPT2", "Mistral", "Gemma", "GPTNeoX", "Llama"])
@pytest.mark.parametrize(
    "pads",
    [{}, {"tokenizer_pads": True}, {"config_pads": 0}],
    ids=["neither", "tokenizer", "config"],
)
def test_decoders_with_and_without_a_padding_token(
    name: str, pads: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = CrossEncoder(make_decoder(name, tmp_path / "model", **pads), device="cpu")
    expected = one_by_one(model)
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.predict(PAIRS, batch_size=1), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        scores = model.forward(model.preprocess(PAIRS))["scores"].sigmoid()
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_that_pairs_are_scored_one_by_one_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from rerank_fast.model.padded import _say_one_by_one

    _say_one_by_one.cache_clear()
    model = CrossEncoder(make_decoder("GPT2", tmp_path / "model"), device="cpu")
    model.predict(PAIRS)
    model.predict(PAIRS)
    said = [record.message for record in caplog.records if "one by one" in record.message]
    assert len(said) == 1
    assert said[0].startswith("This GPT2ForSequenceClassification has no padding token")


def test_a_decoder_without_a_padding_token_trains(tmp_path: Path):
    model = CrossEncoder(make_decoder("GPT2", tmp_path / "model"), device="cpu")
    before = model.predict(PAIRS)
    rows = [
        {"query": "rain", "docs": ["the sea", "a panda and a bear", ""], "labels": [1, 0, 0]}
    ] * 2
    config = TrainingConfig(
        output=str(tmp_path / "trained"), max_steps=2, batch_size=1, precision="fp32"
    )
    Trainer(model, rows, config=config).train()
    assert not np.allclose(
        before, CrossEncoder(tmp_path / "trained", device="cpu").predict(PAIRS), atol=1e-7
    )


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize(
    "pads", [{}, {"config_pads": 0, "tokenizer_pads": True}], ids=["no-pad", "pad"]
)
@pytest.mark.parametrize(
    "pairs", [[("", "")], [("", ""), ("rain", "sea")], [("[PAD]", ""), ("", ""), ("sun", "")]]
)
def test_two_empty_texts_have_one_value(
    name: str, pads: dict[str, Any], pairs: list[Any], tmp_path: Path
):
    """A tokenizer without special tokens gives them the token that ends a text."""
    model = CrossEncoder(make_decoder(name, tmp_path / "model", **pads), device="cpu")
    (place,) = (n for n, pair in enumerate(pairs) if pair == ("", ""))
    tokens = model.tokenize(pairs)
    assert tokens.select(np.array([place])).input_ids.tolist() == [model.tokenizer.eos_token_id]
    scores = model.predict(pairs)
    alone = model.predict([("", "")])
    ended = model.predict([("[SEP]", "")])
    np.testing.assert_allclose(scores[place], alone[0], rtol=1e-5)
    np.testing.assert_allclose(alone, ended, rtol=1e-5)
    if place:
        assert scores[place] != pytest.approx(scores[place - 1], rel=1e-5)


def test_without_a_token_to_end_a_text_they_are_refused(tmp_path: Path):
    model = CrossEncoder(make_decoder("Llama", tmp_path / "model"), device="cpu")
    model.tokenizer.eos_token = model.tokenizer.sep_token = model.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="pair 1: both texts are empty"):
        model.predict([("rain", ""), ("", "")])
    with pytest.raises(ValueError, match="pair 1500: both texts are empty"):  # in a later chunk
        model.predict([*[("rain", "")] * 1500, ("", "")])


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("lengths", [[0], [3, 0, 2], [2, 0]])
def test_pairs_of_no_token_are_named(kind: str, lengths: list[int], tmp_path: Path):
    model = CrossEncoder(make_tiny_bert(tmp_path / "model"), device="cpu")
    tokens = TokenizedPairs(
        np.full(sum(lengths), 5, np.int32), None, np.cumsum([0, *lengths]).astype(np.int64)
    )
    make = Preparer(model.model, model.tokenizer, packed=kind == "packed")
    with pytest.raises(ValueError, match=f"pair {lengths.index(0)} has no token"):
        make(tokens)

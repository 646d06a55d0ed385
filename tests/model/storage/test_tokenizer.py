"""Tokenizers that are missing, damaged or another model's: one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rerank_fast import CrossEncoder
from tests.model.storage.damage import PAIRS, edit, refused


@pytest.mark.parametrize("others", [True, False], ids=["with its config", "without"])
def test_a_directory_without_its_tokenizer(directory: Path, others: bool):
    (directory / "tokenizer.json").unlink()
    if not others:
        for file in directory.glob("*token*"):
            file.unlink()
    refused(directory, r"has no tokenizer: expected the file .*tokenizer\.json")


def test_a_vocabulary_of_special_tokens_alone(directory: Path):
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"] = {
        token: i for token, i in tokenizer["model"]["vocab"].items() if i < 5
    }
    file.write_text(json.dumps(tokenizer))
    refused(directory, r"made of tokenizer\.json.*has no words: only 5 special tokens")


def test_another_models_tokenizer(directory: Path):
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["zebra"] = 5000
    file.write_text(json.dumps(tokenizer))
    refused(directory, r"its token 'zebra' has the number 5000, and config\.json a vocab_size of")


def test_a_special_token_without_an_embedding_is_said(
    directory: Path, caplog: pytest.LogCaptureFixture
):
    """Many a model works with a padding token that was added and is never met."""
    model = CrossEncoder(directory, device="cpu")
    expected = model.predict(PAIRS)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    model.tokenizer.save_pretrained(directory)
    caplog.clear()
    np.testing.assert_array_equal(CrossEncoder(directory, device="cpu").predict(PAIRS), expected)
    (record,) = caplog.records
    number = len(model.tokenizer) - 1
    assert f"its token '<extra>' has the number {number}" in record.message
    for method in (model.predict, model.tokenize):
        with pytest.raises(
            ValueError, match=f"a text has the token '<extra>' with the number {number}"
        ):
            method([*PAIRS, ("rain", "a <extra> bear")])


def test_a_post_processor_that_drops_the_document(directory: Path):
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    pair = tokenizer["post_processor"]["pair"]
    tokenizer["post_processor"]["pair"] = [
        one for one in pair if one.get("Sequence", {}).get("id") != "B"
    ]
    file.write_text(json.dumps(tokenizer))
    refused(directory, "can't tokenise a pair")


DAMAGED = ["[]", "3", "", "{", "\xff"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer_config.json", content) for content in DAMAGED),
        *(("tokenizer.json", content) for content in [*DAMAGED, "{}", '{"version": "1.0"}']),
    ],
)
def test_a_damaged_tokenizer_is_named(directory: Path, name: str, content: str):
    (directory / name).write_bytes(content.encode("latin-1"))
    refused(directory, name.replace(".", r"\."))


@pytest.mark.parametrize("limit", ["64", None, -1, 0, 3, [64], float("nan"), float("inf"), True])
def test_a_limit_that_is_none(directory: Path, limit: Any):
    edit(directory, "tokenizer_config.json", model_max_length=limit)
    if limit is None:
        CrossEncoder(directory, device="cpu")  # transformers takes it for no limit
    else:
        refused(directory, r"tokenizer")


TRUNCATION = {"max_length": 20, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Right",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "[PAD]",
}


@pytest.mark.parametrize("truncation", [None, TRUNCATION], ids=["none", "truncates"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["none", "pads"])
@pytest.mark.parametrize("used", ["predict", "preprocess", "its own call"])
def test_a_tokenizer_is_saved_as_it_came(
    directory: Path,
    tmp_path: Path,
    truncation: dict[str, Any] | None,
    padding: dict[str, Any] | None,
    used: str,
):
    edit(directory, "tokenizer.json", truncation=truncation, padding=padding)
    model = CrossEncoder(directory, device="cpu")
    model.save_pretrained(tmp_path / "unused")
    if used == "its own call":
        model.tokenizer(["a", "b c d"], truncation=True, max_length=5, padding="max_length")
    else:
        getattr(model, used)(PAIRS)
    model.save_pretrained(tmp_path / "used")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        saved = (tmp_path / "used" / name).read_bytes()
        assert saved == (tmp_path / "unused" / name).read_bytes()
        if name == "tokenizer_config.json" and not (truncation or padding):
            assert json.loads(saved) == json.loads((directory / name).read_text())
    content = json.loads((tmp_path / "used" / "tokenizer.json").read_text())
    given = json.loads((directory / "tokenizer.json").read_text())
    assert content["truncation"] == given["truncation"]
    assert content["padding"] == given["padding"]

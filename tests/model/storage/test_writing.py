"""Saving on a full disk, and over another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from rerank_fast import CrossEncoder
from tests.full_disk import files_up_to
from tests.model.storage.damage import PAIRS


@pytest.mark.parametrize("size", [0, 200, 3000])
def test_a_full_disk_leaves_what_was_there(directory: Path, size: int):
    """The config, the tokenizer or the weights do not fit."""
    model = CrossEncoder(directory, device="cpu", activation_fn=nn.Tanh())
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with (
        files_up_to(size),
        pytest.raises(ValueError, match=f"can't write a model to {directory}") as error,
    ):
        model.save_pretrained(directory, overwrite=True)
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_nothing_of_the_model_before_is_read_with_the_new_one(directory: Path):
    model = CrossEncoder(directory, device="cpu")
    expected = model.predict(PAIRS)
    (directory / "added_tokens.json").write_text('{"panda": 3}')
    special = {"sep_token": "the", "cls_token": "rain", "pad_token": "[PAD]"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    model.save_pretrained(directory, overwrite=True)
    again = CrossEncoder(directory, device="cpu")
    np.testing.assert_array_equal(again.predict(PAIRS), expected)
    assert again.tokenizer.sep_token == "[SEP]"

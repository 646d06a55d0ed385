"""Saving on a full disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from rerank_fast import CrossEncoder
from tests.full_disk import files_up_to


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

"""How scores are cut into forward passes where nobody says, and what is made ready for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rerank_fast.model.encoder import _distinct
from rerank_fast.model.packing import MAX_TOKENS
from rerank_fast.model.scoring import _default_max_tokens


def a_step(device: str, tokens: int, width: int) -> Any:
    pairs = SimpleNamespace(input_ids=np.zeros(tokens, np.int32))
    return SimpleNamespace(device=torch.device(device), width=width, tokens=pairs)


@pytest.mark.parametrize(
    ("device", "free_gib", "kept_gib", "width", "expected"),
    [
        ("cpu", 0, 0, 384, MAX_TOKENS),
        ("cuda", 78, 0, 1024, 65536),
        ("cuda", 4, 0, 1024, 32768),
        ("cuda", 1, 3, 1024, 32768),  # what torch keeps is free for torch
        ("cuda", 0, 0, 1024, 1),
    ],
)
def test_half_of_a_gpus_free_memory_holds_a_forward_pass(
    device: str,
    free_gib: int,
    kept_gib: int,
    width: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_gib * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**30 + kept_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**30)
    assert _default_max_tokens(a_step(device, 10**6, width)) == expected


def test_few_tokens_do_not_ask_a_gpu_for_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    assert _default_max_tokens(a_step("cuda", MAX_TOKENS, 384)) == 65536


@pytest.mark.parametrize("ids", [[], [7], [3, 3, 0, 9, 3, 0]])
def test_distinct_ids_are_those_of_a_sort(ids: list[int]):
    given = np.array(ids, np.int32)
    used, places = _distinct(given, 10)
    expected, inverse = np.unique(given, return_inverse=True)
    np.testing.assert_array_equal(used, expected)
    np.testing.assert_array_equal(places, inverse)


def test_an_id_beyond_the_vocabulary_is_an_error():
    with pytest.raises(IndexError, match="10"):
        _distinct(np.array([3, 10], np.int32), 10)

"""How scores are cut into forward passes where nobody says, and what is made ready for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.packed.embeddings import DistinctRows
from rerank_fast.model.packed.encoder import _distinct
from rerank_fast.model.padded import PaddedPairs, _powers_of_two
from rerank_fast.model.preparation import Preparer
from rerank_fast.model.scoring import _default_max_tokens, in_order
from rerank_fast.model.tokens.packing import MAX_TOKENS, TokenizedPairs
from tests.model.packed.test_encoder import NO_DROPOUT, make_model, make_tokens
from tests.model_factory import make_tiny_bert, make_tokenizer


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


@pytest.mark.parametrize("number", [0, 1, 7, 20, 64])
def test_padded_bf16_batches_are_cut_to_few_shapes(number: int):
    indices = np.arange(number)[::-1]
    parts = _powers_of_two(indices)
    assert [part.tolist() for part in parts] == sorted(
        (part.tolist() for part in parts), key=len, reverse=True
    )
    assert all(len(part).bit_count() == 1 for part in parts)
    assert np.concatenate([*parts, np.zeros(0, int)]).tolist() == indices.tolist()


@pytest.mark.parametrize("lengths", [[5, 3, 2], [64, 64, 61, 7, 7, 6, 5]])
def test_padded_scores_do_not_depend_on_the_shapes(lengths: list[int], tmp_path: Path):
    """bf16 on a CPU is padded to few widths, which the position table limits; 64 is all that it
    holds.
    """
    model = CrossEncoder(make_tiny_bert(tmp_path / "bert"), device="cpu", dtype="float32").model
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.random.default_rng(0).integers(5, 40, offsets[-1]).astype(np.int32)
    tokens = TokenizedPairs(ids, None, offsets)
    step = PaddedPairs(model, make_tokenizer(), tokens, dtype=torch.bfloat16)
    assert step.keeps_shapes
    shapes = []
    forward = model.forward

    def seen(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    model.forward = seen
    with torch.no_grad(), step.region:
        few = step(np.arange(len(lengths)))
        step.keeps_shapes = False
        exact = step(np.arange(len(lengths)))
    torch.testing.assert_close(few, exact, rtol=0, atol=2e-2)
    *padded, last = shapes
    assert last == (len(lengths), max(lengths))
    assert all(rows.bit_count() == 1 and width <= 64 for rows, width in padded)


def test_a_run_of_steps_shares_copies_of_the_weights_as_they_are():
    """A graph of weights that a later step's have written over says so."""
    model = make_model("bert", **NO_DROPOUT)
    tokens = make_tokens([5, 3, 7])
    make, all_pairs = Preparer(model, None, dtype=torch.bfloat16), np.arange(3)
    make(tokens)(all_pairs).sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    scores = make(tokens)(all_pairs)
    assert torch.equal(scores, Preparer(model, None, dtype=torch.bfloat16)(tokens)(all_pairs))
    make(tokens)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


@pytest.mark.parametrize("change", ["parameter", "dtype"])
def test_weights_that_are_others_are_taken_anew(change: str):
    model = make_model("bert", **NO_DROPOUT)
    tokens, all_pairs = make_tokens([5, 3, 7]), np.arange(3)
    make = Preparer(model, None)
    make(tokens)
    if change == "dtype":
        model.bfloat16()
    else:
        up = model.bert.encoder.layer[1].intermediate.dense
        up.weight = torch.nn.Parameter(2 * up.weight.detach())
    expected = Preparer(model, None)(tokens)(all_pairs)
    assert torch.equal(make(tokens)(all_pairs), expected)


def test_rows_of_a_table_get_their_gradients_and_padding_none():
    table = torch.randn(6, 4, requires_grad=True)
    DistinctRows.apply(table, torch.tensor([1, 2, 5]), 2).backward(torch.ones(3, 4))
    expected = torch.zeros(6, 4)
    expected[[1, 5]] = 1
    assert torch.equal(table.grad, expected)


def test_scores_and_gradients_go_back_to_the_order_of_the_pairs():
    plan = [np.array([3, 0]), np.array([1, 4, 2])]
    parts = [
        torch.tensor([3.0, 0.0], requires_grad=True),
        torch.tensor([1.0, 4.0, 2.0], requires_grad=True),
    ]
    scores = in_order(parts, plan)
    assert scores.tolist() == [0, 1, 2, 3, 4]
    scores.backward(torch.arange(5.0))
    assert [part.grad.tolist() for part in parts] == [[3, 0], [1, 4, 2]]

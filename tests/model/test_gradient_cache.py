"""Cached and direct give one gradient; what has none is not run again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_fast import CrossEncoder, lambda_loss
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists
from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.preparation import Preparer
from rerank_fast.model.tokens.packing import plan_micro_batches
from tests.training.conftest import make_lists

CPU = torch.device("cpu")


def opened(path: Path, *, checkpointing: bool = False) -> tuple[CrossEncoder, TokenizedLists]:
    model = CrossEncoder(path, device="cpu").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenize_lists(list(make_lists(6)), model)


def push(
    model: CrossEncoder,
    lists: TokenizedLists,
    *,
    cached: bool,
    packed: bool = True,
    k: int | None = None,
    **options,
):
    """Gradients by name, the result and a number drawn afterwards."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    step = Preparer(model.model, model.tokenizer, packed=packed)(lists.pairs)
    plan = plan_micro_batches(lists.pairs.lengths, max_pairs=5)
    labels, offsets = torch.from_numpy(lists.labels), torch.from_numpy(lists.list_offsets)
    loss = lambda scores: lambda_loss(scores, labels, offsets, k=k)  # noqa: E731
    if cached:
        result = backward_cached(step, plan, loss, device=CPU, **options)
    else:
        result = backward_direct(step, plan, loss)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, result, torch.rand(1)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_gives_the_gradient_of_direct_with_dropout(
    tiny_bert: Path, packed: bool, checkpointing: bool
):
    direct_model, lists = opened(tiny_bert)
    expected, direct, drawn = push(direct_model, lists, cached=False, packed=packed)
    other, _ = opened(tiny_bert, checkpointing=checkpointing)
    found, cached, also_drawn = push(other, lists, cached=True, packed=packed)
    assert torch.equal(direct.scores, cached.scores)
    assert torch.equal(direct.loss, cached.loss)
    assert torch.equal(drawn, also_drawn)  # the next step's dropout is the same too
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    # Dropout is at work, and without the first run's random numbers the gradient would be another.
    torch.manual_seed(8)
    direct_model.zero_grad()
    step = Preparer(direct_model.model, direct_model.tokenizer, packed=packed)(lists.pairs)
    assert not torch.equal(step(np.arange(4)), direct.scores[:4])


class Counted:
    """Prepared pairs, with a list of those that were run."""

    def __init__(self, prepared) -> None:
        self.prepared, self.runs = prepared, []

    def __getattr__(self, name: str):
        return getattr(self.prepared, name)

    def __call__(self, indices: np.ndarray, *keep: np.ndarray) -> torch.Tensor:
        self.runs.append(sorted(indices.tolist()))
        return self.prepared(indices, *keep)


def test_a_pair_without_gradient_is_not_run_again(
    still_bert: Path, monkeypatch: pytest.MonkeyPatch
):
    model, lists = opened(still_bert)
    expected, direct, _ = push(model, lists, cached=False, k=1)
    labels, offsets = torch.from_numpy(lists.labels), torch.from_numpy(lists.list_offsets)
    scores = direct.scores.clone().requires_grad_()
    lambda_loss(scores, labels, offsets, k=1).backward()
    without = int((scores.grad == 0).sum())
    assert 0 < without < len(scores)
    steps: list[Counted] = []
    make = Preparer.__call__

    def counted(*arguments) -> Counted:
        steps.append(Counted(make(*arguments)))
        return steps[-1]

    monkeypatch.setattr(Preparer, "__call__", counted)
    found, cached, _ = push(model, lists, cached=True, k=1, packed=False)
    again = [i for run in steps[-1].runs[(len(scores) + 4) // 5 :] for i in run]
    assert sorted(again) == (scores.grad != 0).nonzero().flatten().tolist()
    assert cached.num_skipped == without
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


# Lists of which, with a cut at 1, few pairs count: some of these share a micro-batch with pairs
# that do not.
LONG = [
    {"query": query, "docs": ["bear " * n for n in range(1, 41)], "labels": [1.0] + [0.0] * 39}
    for query in ("panda", "rain sea")
]


def upstream_of(lists: TokenizedLists, scores: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """dL/dscores."""
    leaf = scores.clone().requires_grad_()
    lambda_loss(
        leaf, torch.from_numpy(lists.labels), torch.from_numpy(lists.list_offsets), k=k
    ).backward()
    return leaf.grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pairs_that_are_run_again_keep_their_dropout(tiny_bert: Path, checkpointing: bool):
    model, _ = opened(tiny_bert, checkpointing=checkpointing)
    lists = tokenize_lists(LONG, model)
    expected, direct, drawn = push(model, lists, cached=False, k=1)
    found, cached, also_drawn = push(model, lists, cached=True, k=1)
    without = upstream_of(lists, direct.scores, k=1) == 0
    assert cached.num_skipped == int(without.sum()) > 0.5 * len(without)
    plan = plan_micro_batches(lists.pairs.lengths, max_pairs=5)
    assert any(without[part].any() and not without[part].all() for part in plan)
    assert torch.equal(drawn, also_drawn)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_skip_below_with_dropout_is_the_gradient_of_the_rest(
    tiny_bert: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    model, lists = opened(tiny_bert, checkpointing=checkpointing)
    _, direct, _ = push(model, lists, cached=False)
    upstream = upstream_of(lists, direct.scores)
    limit = float(upstream.abs().median())
    found, cached, _ = push(model, lists, cached=True, skip_below=lambda scores: limit)
    assert cached.num_skipped == int((upstream.abs() <= limit).sum())
    upstream = upstream.where(upstream.abs() > limit, 0.0)
    monkeypatch.setitem(globals(), "lambda_loss", lambda scores, *_, **__: scores @ upstream)
    expected, _, _ = push(model, lists, cached=False)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("why", ["padded", "a module of its own draws"])
def test_where_dropout_is_drawn_for_a_micro_batch_it_is_left_out_whole(tiny_bert: Path, why: str):
    model, _ = opened(tiny_bert)
    lists = tokenize_lists(LONG, model)
    if why != "padded":  # as an adapter's dropout does
        dense = model.model.bert.encoder.layer[0].output.dense
        dense.register_forward_hook(
            lambda module, inputs, out: torch.nn.functional.dropout(out, 0.2)
        )
    packed = why != "padded"
    expected, direct, _ = push(model, lists, cached=False, packed=packed, k=1)
    upstream = upstream_of(lists, direct.scores, k=1)
    plan = plan_micro_batches(lists.pairs.lengths, max_pairs=5)
    whole = sum(len(part) for part in plan if not upstream[torch.from_numpy(part)].any())
    assert whole < int((upstream == 0).sum())
    found, cached, _ = push(model, lists, cached=True, packed=packed, k=1)
    assert cached.num_skipped == whole > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_skip_below_leaves_out_small_gradients_and_counts_them(still_bert: Path):
    model, lists = opened(still_bert)
    expected, direct, _ = push(model, lists, cached=False)
    scores = direct.scores.clone().requires_grad_()
    lambda_loss(
        scores, torch.from_numpy(lists.labels), torch.from_numpy(lists.list_offsets)
    ).backward()
    limit = float(scores.grad.abs().median())
    found, cached, _ = push(model, lists, cached=True, skip_below=lambda scores: limit)
    assert cached.num_skipped == int((scores.grad.abs() <= limit).sum())
    name = "model.classifier.weight"
    assert not torch.allclose(found[name], expected[name], rtol=0, atol=1e-6)


class Held:
    """What autograd keeps of a tensor for backward, counted while it is alive."""

    live = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Held.live += self.size
        Held.peak = max(Held.peak, Held.live)

    def __del__(self) -> None:
        Held.live -= self.size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_memory_does_not_grow_with_documents_or_lists(tiny_bert: Path, checkpointing: bool):
    model, _ = opened(tiny_bert, checkpointing=checkpointing)
    peaks: dict[tuple[bool, int, int], int] = {}
    for num_lists, documents in ((1, 8), (1, 64), (1, 256), (16, 16)):
        rows = [
            {
                "query": "panda",
                "docs": ["bear rain sea"] * documents,
                "labels": [1.0] + [0.0] * (documents - 1),
            }
        ]
        lists = tokenize_lists(rows * num_lists, model)
        for cached in (True, False):
            Held.live = Held.peak = 0
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
                push(model, lists, cached=cached)
            peaks[cached, num_lists, documents] = Held.peak
    cached_peaks = [peak for (cached, *_), peak in peaks.items() if cached]
    assert max(cached_peaks) < 1.1 * min(cached_peaks)
    assert peaks[False, 1, 256] > 20 * peaks[True, 1, 256]
    assert peaks[False, 1, 256] > 20 * peaks[False, 1, 8]

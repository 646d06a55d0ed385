"""Lists to gradients: all graphs or one at a time by the memory, and what happens when it runs
out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.data.tokenized import tokenize_lists
from rerank_fast.model import preparation
from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.training.backward import Backward
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.memory import activation_bytes
from rerank_fast.training.run_log import Rates
from tests.model.test_gradient_cache import opened, upstream_of
from tests.training.conftest import config_for, log_rows

FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
)


def backward(model: CrossEncoder, gradient_cache: str, max_tokens: int = 4096) -> Backward:
    config = TrainingConfig(precision="fp32", gradient_cache=gradient_cache)

    def forget() -> None:
        model.zero_grad(set_to_none=True)

    return Backward(model, config, LambdaLoss(), lambda value: value, forget, max_tokens=max_tokens)


def limit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """No micro-batch of more tokens fits memory."""
    real = PackedPairs.__call__

    def call(self: PackedPairs, indices: np.ndarray, *keep: np.ndarray) -> torch.Tensor:
        if self.tokens.lengths[indices].sum() > most:
            raise FULL
        return real(self, indices, *keep)

    monkeypatch.setattr(PackedPairs, "__call__", call)


def gradients(
    run: Backward, parts: list[Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, Rates]:
    torch.manual_seed(7)
    run.model.zero_grad(set_to_none=True)
    rates = Rates()
    loss, _ = run(parts, 3.0, rates)
    return (
        {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None},
        loss,
        rates,
    )


def test_auto_keeps_the_graphs_while_they_fit(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    model, lists = opened(tiny_bert)
    used: list[str] = []
    for name, function in (
        ("backward_cached", backward_cached),
        ("backward_direct", backward_direct),
    ):

        def note(*arguments, name=name, function=function, **options):
            used.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(f"rerank_fast.training.backward.{name}", note)
    needed = activation_bytes(
        model.model, len(lists.pairs.input_ids), torch.float32, gradient_checkpointing=False
    )
    state = 12 * sum(weight.numel() for weight in model.parameters())
    for free in (state + 2 * needed + 2, state + 2 * needed - 2):
        monkeypatch.setattr(
            "rerank_fast.training.backward.available_bytes", lambda device, free=free: free
        )
        backward(model, "auto")([lists], 1.0, Rates())
    assert used == ["backward_direct", "backward_cached"]


@pytest.mark.parametrize("gradient_cache", ["on", "auto", "off"])
def test_a_step_that_does_not_fit_is_begun_anew_with_half_the_tokens(
    tiny_bert: Path,
    gradient_cache: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Two parts, of which the second one runs out of memory: the first one's gradient must not
    count twice.
    """
    model, lists = opened(tiny_bert)
    parts = sorted(lists.split(2), key=lambda part: part.pairs.lengths.sum())
    first, second = (int(part.pairs.lengths.sum()) for part in parts)
    assert second // 2 <= first < second
    expected, loss, counted = gradients(
        backward(model, "on" if gradient_cache == "auto" else gradient_cache, second // 2), parts
    )
    limit(monkeypatch, second - 1)
    run = backward(model, gradient_cache)
    with caplog.at_level(logging.WARNING):
        found, found_loss, rates = gradients(run, parts)
    assert run.max_tokens == second // 2
    assert torch.equal(found_loss, loss)  # the dropout masks too are those of a run that began so
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (
        (rates.scored, rates.tokens)
        == (counted.scored, counted.tokens)
        == (len(lists.pairs), first + second)
    )
    also = ", and one micro-batch's graph at a time" if gradient_cache == "auto" else ""
    assert [record.getMessage() for record in caplog.records] == [
        f"A step with micro-batches of {second} tokens does not fit memory: from here on with "
        f"{second // 2}{also}."
    ]


def test_what_does_not_fit_either_says_what_helps(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    model, lists = opened(tiny_bert)
    limit(monkeypatch, 10)
    with pytest.raises(MemoryError, match=r"nor with micro-batches of \d+ tokens: expected grad"):
        backward(model, "on")([lists], 1.0, Rates())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_errors_pass(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    model, lists = opened(tiny_bert)
    monkeypatch.setattr(
        PackedPairs, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("something else"))
    )
    with pytest.raises(RuntimeError, match="something else"):
        backward(model, "on")([lists], 1.0, Rates())


def test_a_run_finds_the_models_parts_once(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch):
    """And each step has the weights as they are then."""
    model, lists = opened(tiny_bert)
    found = []
    real = preparation.find_architecture

    def find(*arguments: Any) -> Any:
        found.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(preparation, "find_architecture", find)
    run = backward(model, "off")
    gradients(run, [lists])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    again, loss, _ = gradients(run, [lists])
    assert len(found) == 1
    anew, expected, _ = gradients(backward(model, "off"), [lists])
    assert torch.equal(loss, expected)
    assert all(torch.equal(again[name], anew[name]) for name in anew)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_computed_again_in_training_only(tiny_bert: Path, checkpointing: bool):
    model, lists = opened(tiny_bert, checkpointing=checkpointing)
    make = model.train().preparer()
    assert make(lists.pairs).gradient_checkpointing == checkpointing
    model.eval()
    assert not make(lists.pairs).gradient_checkpointing


def test_skip_below_is_of_the_loss_that_the_cut_leaves(still_bert: Path, tmp_path: Path):
    """Its divisor, the pairs under the cut, is known only when all are scored."""
    words = ["weather", "rain", "sea", "museum", "city", "wind"]
    draw = np.random.default_rng(5)
    docs = [[" ".join(draw.choice(words, 6)) for _ in range(20)] for _ in range(4)]
    rows = Dataset.from_dict(
        {"query": ["panda"] * 4, "docs": docs, "labels": [[1.0] * 3 + [0.0] * 17] * 4}
    )
    model = CrossEncoder(still_bert, device="cpu")
    lists = tokenize_lists(rows.to_list(), model)
    scores = model.score_tokens(lists.pairs, activation_fn=torch.nn.Identity())
    upstream = upstream_of(lists, scores, k=1).abs()
    limit = float(upstream[upstream > 0].median()) * 1.001
    config = config_for(
        tmp_path,
        k=1,
        gradient_cache="on",
        skip_below=limit,
        batch_size=4,
        max_steps=1,
        mini_batch_size=1,
    )
    Trainer(model, rows, config=config).train()
    (row,) = log_rows(tmp_path)
    expected = float((upstream <= limit).float().mean())
    assert 0 < expected < 1
    assert row["skipped_share"] == pytest.approx(expected, abs=0.01)
    assert row["gradient_norm"] > 0

"""Gradients leave while backward still runs, and every process sends the same messages, whatever it
computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rerank_fast.training.distributed import buckets, collectives
from rerank_fast.training.distributed.buckets import GradientBuckets
from tests.training.conftest import make_lists
from tests.training.distributed.test_distributed import in_two_processes


@pytest.fixture(scope="module")
def found(still_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of each case what both processes found: see bucketed_run."""
    directory = tmp_path_factory.mktemp("buckets")
    lists = directory / "lists.json"
    lists.write_text(json.dumps(list(make_lists(9))))
    run = in_two_processes(
        [], directory, 29617, program="bucketed_run", arguments=[still_bert, lists]
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["direct", "cached"])
@pytest.mark.parametrize(
    "case", ["equal", "accumulated", "micro-batches", "no lists", "memory runs out"]
)
def test_sums_are_those_of_one_process(found: dict[str, list[Any]], mode: str, case: str):
    first, second = found[f"{mode}, {case}"]
    assert first["sizes"] == second["sizes"]
    assert len(first["sizes"]) > 10
    # All but the last bucket can leave before the end: that of the embeddings, which the last
    # gradients to come belong to.
    most = len(first["sizes"]) - 1
    assert first["early"] == most
    if case == "no lists":
        assert second["early"] == 0
    elif case == "memory runs out":  # what had left by then has left
        assert 0 < second["early"] <= most
    else:
        assert second["early"] == most
    for one in (first, second):
        assert one["distance"] < 1e-6
        assert one["loss"] < 1e-5


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of messages, which come back as two equal processes' sums."""
    sizes: list[int] = []

    class Work:
        def __init__(self, flat: Tensor) -> None:
            self._flat = flat

        def wait(self) -> None:
            self._flat.mul_(2)

    def all_reduce(flat: Tensor, *, async_op: bool) -> Work:
        assert async_op
        sizes.append(flat.numel())
        return Work(flat)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(buckets, "_BUCKET", 40)
    monkeypatch.setattr(collectives, "_ALIGNED", 1)
    return sizes


def chain() -> tuple[list[nn.Parameter], GradientBuckets]:
    """Three weights, used in their order, of one bucket each."""
    weights = [nn.Parameter(torch.eye(5)) for _ in range(3)]
    return weights, GradientBuckets([(one, one) for one in weights])


def value(weights: list[nn.Parameter]) -> Tensor:
    x = torch.ones(1, 5)
    for weight in weights:
        x = x @ weight
    return x.sum()


def test_only_the_last_backward_sends(sent: list[int]):
    weights, summed = chain()
    totals = torch.ones(3)
    value(weights).backward()
    assert sent == []
    summed.final()
    value(weights).backward()
    assert sent == [25, 25]
    gradients = summed.finish(totals)
    assert sent == [25, 25, 28]  # the last one with the totals
    assert totals.tolist() == [2, 2, 2]
    for weight, gradient in zip(weights[::-1], gradients, strict=True):
        assert weight.grad is gradient
        assert torch.equal(gradient, torch.full((5, 5), 4.0))


def test_what_is_still_to_come_is_waited_for(sent: list[int]):
    weights, summed = chain()
    shared = weights[0] * 2
    leaf = shared.detach().requires_grad_()
    summed.final([shared])
    (leaf.sum() + value(weights)).backward()
    assert sent == [25, 25]
    summed.final()
    shared.backward(leaf.grad)
    assert sent == [25, 25]
    summed.finish(torch.zeros(3))
    assert float(weights[0].grad.sum()) == 2 * (25 + 50)


def test_a_weight_that_nothing_reached_holds_the_rest_back_and_counts_as_zeros(sent: list[int]):
    weights, summed = chain()
    summed.final()
    value(weights[:2]).backward()
    assert sent == []
    summed.finish(torch.zeros(3))
    assert sent == [25, 25, 28]
    assert [float(weight.grad.sum()) for weight in weights] == [50, 50, 0]


def test_what_is_begun_anew_sends_the_rest_once(sent: list[int]):
    weights, summed = chain()
    fails = [True]

    def fail(gradient: Tensor) -> None:
        if fails.pop():
            raise RuntimeError("memory")

    hook = weights[0].register_hook(fail)
    summed.final()
    with pytest.raises(RuntimeError, match="memory"):
        value(weights).backward()
    assert sent == [25, 25]
    hook.remove()
    for weight in weights:
        weight.grad = None
    summed.begin_anew()
    value(weights).backward()
    summed.final()
    value(weights).backward()
    assert sent == [25, 25]
    summed.finish(torch.zeros(3))
    assert sent == [25, 25, 28]
    # Those of the first time, and of both backwards of the second.
    assert [float(weight.grad.sum()) for weight in weights] == [100, 50, 50]


def test_a_gradient_that_changes_after_it_was_sent_is_an_error(sent: list[int]):
    weights, summed = chain()
    summed.final()
    value(weights).backward()
    with pytest.raises(RuntimeError, match="must not be reentrant"):
        value(weights).backward()


def test_weights_of_another_dtype_have_their_own_messages_and_released_ones_none(sent: list[int]):
    narrow = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.ones(5))
    summed = GradientBuckets([(narrow, narrow), (wide, wide)])
    totals = torch.ones(3)
    (narrow.float() * wide).sum().backward()
    summed.finish(totals)
    assert sent == [5, 5, 3]
    assert totals.tolist() == [2, 2, 2]
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    summed.release()
    summed.final()
    (narrow.float() * wide).sum().backward()
    assert len(sent) == 3

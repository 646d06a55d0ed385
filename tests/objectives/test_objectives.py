"""Every objective against its formula in plain Python, and what all of them promise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.tools.gpu_counts import counting
from rerank_fast.objectives.adr_mse import ADRMSE
from rerank_fast.objectives.approx_ndcg import ApproxNDCG
from rerank_fast.objectives.binary_cross_entropy import BinaryCrossEntropy
from rerank_fast.objectives.infonce import InfoNCE
from rerank_fast.objectives.listmle import ListMLE
from rerank_fast.objectives.listnet import ListNet
from rerank_fast.objectives.margin_mse import MarginMSE
from rerank_fast.objectives.mse import MSE
from rerank_fast.objectives.plistmle import PListMLE
from rerank_fast.objectives.ranknet import RankNet
from tests.objectives import by_hand

OBJECTIVES = [
    MSE(),
    MSE(reduction="list_means"),
    BinaryCrossEntropy(),
    BinaryCrossEntropy(pos_weight=3.5, reduction="list_means"),
    MarginMSE(),
    MarginMSE(pairs="all"),
    MarginMSE(reduction="list_means"),
    MarginMSE(pairs="all", reduction="list_means"),
    ListNet(),
    ListNet(temperature=0.5, label_temperature=2.0),
    ListNet(kl=True),
    ListMLE(),
    ListMLE(respect_input_order=True),
    PListMLE(),
    PListMLE(respect_input_order=True),
    InfoNCE(),
    InfoNCE(temperature=0.3, positives="any"),
    InfoNCE(temperature=2.0),
    RankNet(),
    RankNet(sigma=0.5, reduction_log="natural", reduction="lists"),
    RankNet(k=3),
    ADRMSE(),
    ADRMSE(alpha=3.0, reduction="list_means"),
    ApproxNDCG(),
    ApproxNDCG(alpha=1.0),
]
SIZES = [3, 0, 7, 1, 10, 2, 0]


def changed(objective):
    """Options that are not the defaults."""
    return [f"{k}={v}" for k, v in objective.describe().items() if v != getattr(type(objective), k)]


every = pytest.mark.parametrize(
    "objective",
    OBJECTIVES,
    ids=lambda one: "-".join([one.name, *changed(one)]),
)


def lists(objective, sizes=SIZES, *, dtype=torch.float64, seed=0):
    """Scores, labels that the objective takes, and offsets."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.randn(n, generator=generator, dtype=torch.float64)
    if objective.name in ("mse", "margin_mse"):
        labels = torch.randn(n, generator=generator, dtype=torch.float64) * 4
    elif objective.name == "binary_cross_entropy":
        labels = torch.randint(0, 5, (n,), generator=generator) / 4
    else:
        labels = torch.randint(0, 4, (n,), generator=generator)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return scores.to(dtype), labels.float(), offsets


def summed_by_hand(objective, scores, labels, offsets):
    parts = [
        getattr(by_hand, objective.name)(scores[a:b].tolist(), labels[a:b].tolist(), objective)
        for a, b in itertools.pairwise(offsets.tolist())
    ]
    return sum(total for total, _ in parts), sum(units for _, units in parts)


def gradient(objective, scores, labels, offsets):
    leaf = scores.detach().clone().requires_grad_()
    total = objective(leaf, labels, offsets).total
    return total.detach(), torch.autograd.grad(total, leaf)[0]


@every
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_sum_written_out(objective, seed):
    scores, labels, offsets = lists(objective, seed=seed)
    total, units = summed_by_hand(objective, scores, labels, offsets)
    found, counted = objective(scores, labels, offsets)
    assert found.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    if objective.cut_by_rank:
        assert counted.dtype == torch.int64
        assert counted.item() == units
    else:
        assert counted is None
        assert objective.num_units(labels.numpy(), offsets.numpy()) == units


@every
def test_gradcheck(objective):
    scores, labels, offsets = lists(objective)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: objective(s, labels, offsets).total, (scores,))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_at_least_and_the_gradient_in_the_input_dtype(objective, dtype):
    scores, labels, offsets = lists(objective, [5, 40, 1, 3], dtype=dtype)
    total, grad = gradient(objective, scores, labels, offsets)
    exact_total, exact_grad = gradient(objective, scores.double(), labels, offsets)
    assert total.dtype == torch.float32
    assert grad.dtype == dtype
    assert total.item() == pytest.approx(exact_total.item(), rel=3e-6, abs=1e-6)
    error = (grad.double() - exact_grad).abs()
    rounding = torch.finfo(dtype).eps / 2 * exact_grad.abs()
    assert bool((error <= rounding + 3e-6 * exact_grad.abs().max()).all())


@every
def test_a_loss_scale_reaches_fp16_gradients_before_they_are_rounded(objective):
    scores, labels, offsets = lists(objective, [5, 4], dtype=torch.float16)
    _, exact = gradient(objective, scores.double(), labels, offsets)
    leaf = scores.clone().requires_grad_()
    small = 1e-4 / exact.abs().max()
    (objective(leaf, labels, offsets).total * small).backward(torch.tensor(1e3))
    expected = exact * small * 1e3
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-3, atol=1e-5)


@every
@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [1], [1, 0, 1]])
def test_nothing_to_compare_is_a_connected_zero(objective, sizes):
    scores, labels, offsets = lists(objective, sizes, dtype=torch.float32)
    scores.requires_grad_()
    total = objective(scores, labels, offsets).total
    total.backward()
    assert total.shape == ()
    if objective.contributes(np.ones(1)):  # pointwise losses are of one document too
        expected, _ = summed_by_hand(objective, scores.detach(), labels, offsets)
        assert total.item() == pytest.approx(expected, rel=1e-6)
    else:
        assert total.item() == 0
        assert scores.grad.tolist() == [0.0] * len(scores)


@every
def test_lists_that_do_not_contribute_have_no_gradient(objective):
    for labels in ([1.0, 1, 1], [0.0, 0, 0], [1.0], [0.0, 1]):
        labels = torch.tensor(labels)
        scores, offsets = torch.randn(len(labels)), torch.tensor([0, len(labels)])
        _, grad = gradient(objective, scores, labels, offsets)
        if not objective.contributes(labels.numpy()):
            assert grad.tolist() == [0.0] * len(labels)
        else:
            assert grad.abs().max() > 0


@every
@pytest.mark.parametrize("where", ["scores", "labels"])
@pytest.mark.parametrize("at", [0, 4, 11, 20])
def test_nan_is_seen_in_its_list_alone(objective, where, at):
    scores, labels, offsets = lists(objective, dtype=torch.float32)
    if where == "labels" and getattr(objective, "respect_input_order", False):
        pytest.skip("reads no labels")
    _, clean = gradient(objective, scores, labels, offsets)
    {"scores": scores, "labels": labels}[where][at] = math.nan
    total, grad = gradient(objective, scores, labels, offsets)
    assert total.isnan()
    own = torch.searchsorted(offsets, torch.tensor(at), right=True)
    inside = torch.zeros(len(scores), dtype=torch.bool)
    inside[offsets[own - 1] : offsets[own]] = True
    assert grad[inside].isnan().any()
    torch.testing.assert_close(grad[~inside], clean[~inside], rtol=1e-5, atol=1e-6)


@every
def test_a_batch_is_the_sum_of_its_parts_in_any_order_of_lists(objective):
    scores, labels, offsets = lists(objective)
    total, grad = gradient(objective, scores, labels, offsets)
    units = objective.num_units(labels.numpy(), offsets.numpy())
    bounds = list(itertools.pairwise(offsets.tolist()))
    parts = [[6, 2], [0], [4, 1, 3], [5]]
    sums, found, counted = [], torch.zeros_like(grad), 0
    for part in parts:
        index = torch.cat([torch.arange(*bounds[q]) for q in part])
        own = torch.tensor([0, *itertools.accumulate(SIZES[q] for q in part)])
        part_total, part_grad = gradient(objective, scores[index], labels[index], own)
        sums.append(part_total)
        found[index] = part_grad
        counted += objective.num_units(labels[index].numpy(), own.numpy())
    torch.testing.assert_close(sum(sums), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-12)
    assert counted == units


@every
def test_a_constant_added_to_scores_changes_what_it_should(objective):
    """Pairwise and listwise losses see differences alone: large scores cost their own digits."""
    if objective.name in ("mse", "binary_cross_entropy"):
        pytest.skip("fits scores themselves")
    scores, labels, offsets = lists(objective)
    moved = scores + torch.repeat_interleave(
        torch.linspace(-1e4, 1e4, len(SIZES), dtype=torch.float64), offsets.diff()
    )
    expected, expected_grad = gradient(objective, scores, labels, offsets)
    total, grad = gradient(objective, moved, labels, offsets)
    torch.testing.assert_close(total, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-9)


@every
def test_extreme_scores_stay_finite(objective):
    scores, labels, offsets = lists(objective, dtype=torch.float32)
    total, grad = gradient(objective, scores * 1e4, labels, offsets)
    assert total.isfinite()
    assert grad.isfinite().all()


@every
def test_inputs_of_any_layout(objective):
    scores, labels, offsets = lists(objective)
    expected, expected_grad = gradient(objective, scores, labels, offsets)
    apart = [torch.stack([one, one + 1], dim=1)[:, 0] for one in (scores, labels, offsets)]
    leaf = apart[0].requires_grad_()
    total = objective(leaf, *apart[1:]).total
    torch.testing.assert_close(total.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0], expected_grad)


@every
def test_second_derivatives_are_refused_or_right_and_inputs_are_checked(objective):
    scores, labels, offsets = lists(objective)
    scores.requires_grad_()
    if objective.name in ("mse", "binary_cross_entropy"):  # PyTorch's own losses

        def run(s):
            return objective(s, labels, offsets).total

        assert torch.autograd.gradgradcheck(run, (scores,))
    else:
        total = objective(scores, labels, offsets).total
        (grad,) = torch.autograd.grad(total, scores, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated"):
            grad.square().sum().backward()
    for arguments, message in (
        ((scores[None], labels, offsets), "scores must be"),
        ((scores, labels[:-1], offsets), "labels must have"),
        ((scores, labels, offsets.int()), "offsets must be"),
        ((scores, labels, offsets.clone().fill_(3)), "offsets must rise"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(*arguments)


@every
def test_describes_itself_in_plain_values(objective):
    options = objective.describe()
    assert all(isinstance(value, (str, int, float, bool, type(None))) for value in options.values())
    assert type(objective)(**options) == objective
    assert replace(objective) == objective
    assert hash(objective) == hash(replace(objective))


@every
def test_a_gpu_is_neither_waited_for_nor_sent_anything(objective):
    tensors = lists(objective, dtype=torch.float32)
    scores, labels, offsets = (tensor.to("meta") for tensor in tensors)
    scores.requires_grad_()
    with counting(np.ones(1)) as counts:
        objective(scores, labels, offsets).total.backward()
    assert scores.grad.shape == scores.shape
    tallies = counts.phases.values()
    assert sum(tally.syncs + tally.uploads for tally in tallies) == 0
    assert 0 < sum(tally.launches for tally in tallies) <= 100  # forward and backward

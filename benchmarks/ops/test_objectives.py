"""Every objective, forward and backward, beside sentence-transformers' loss of the same logits.

LambdaLoss has benchmarks of its own, in test_lambda_loss.py; what sentence-transformers lacks is
timed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder, losses
from torch import nn

from rerank_fast import lambda_loss
from rerank_fast.objectives.adr_mse import ADRMSE
from rerank_fast.objectives.approx_ndcg import ApproxNDCG
from rerank_fast.objectives.base import Objective
from rerank_fast.objectives.binary_cross_entropy import BinaryCrossEntropy
from rerank_fast.objectives.infonce import InfoNCE
from rerank_fast.objectives.listmle import ListMLE
from rerank_fast.objectives.listnet import ListNet
from rerank_fast.objectives.margin_mse import MarginMSE
from rerank_fast.objectives.mse import MSE
from rerank_fast.objectives.plistmle import PListMLE
from rerank_fast.objectives.ranknet import RankNet


class _Scores(CrossEncoder):
    """Stands in for a CrossEncoder so that only the loss is timed: no text, scores are a leaf."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.scores = scores  # (N,) list after list, or (D, Q): what a call of the model gives
        self.calls = 0

    def preprocess(self, pairs, prompt=None, task=None):
        return {}

    def forward(self, features):
        if self.scores.dim() == 1:
            return {"scores": self.scores[:, None]}
        row = self.calls % len(self.scores)
        self.calls += 1
        return {"scores": self.scores[row][:, None]}


@dataclass(frozen=True)
class Case:
    objective: Objective
    peer: Any = None  # sentence-transformers' class; None: it has none
    options: dict[str, Any] | None = None
    inputs: str = "lists"  # or "pairs"; "columns": query, positive, negative_1, ...; "logits"


EVERYTHING = {"mini_batch_size": -1}
AS_IT_IS = {"scale": 1, "activation_fn": None}
CASES = [
    Case(MSE(), losses.MSELoss, {}, "pairs"),
    Case(BinaryCrossEntropy(), losses.BinaryCrossEntropyLoss, {}, "pairs"),
    Case(MarginMSE(), losses.MarginMSELoss, {}, "columns"),
    Case(MarginMSE(pairs="all")),
    Case(RankNet(), losses.RankNetLoss, EVERYTHING),
    Case(ListNet(), losses.ListNetLoss, EVERYTHING),
    Case(ListMLE(), losses.ListMLELoss, EVERYTHING | {"respect_input_order": False}),
    Case(PListMLE(), losses.PListMLELoss, EVERYTHING | {"respect_input_order": False}),
    Case(InfoNCE(), losses.MultipleNegativesRankingLoss, AS_IT_IS, "logits"),
    Case(ADRMSE(), losses.ADRMSELoss, EVERYTHING),
    Case(ApproxNDCG()),
]
SIZES = [  # lists, documents, rounds, calls in a row
    pytest.param(16, 10, 10, 50, id="16x10"),
    pytest.param(64, 100, 7, 5, id="64x100"),
    pytest.param(16, 1000, 5, 1, id="16x1000"),
]


def peer_inputs(kind: str, num_lists: int, num_docs: int, labels: torch.Tensor) -> tuple[Any, Any]:
    """What sentence-transformers' losses take of (Q, D) labels, without any text."""
    if kind == "lists":
        return [["q"] * num_lists, [["d"] * num_docs] * num_lists], list(labels)
    if kind == "pairs":
        return [["q"] * labels.numel(), ["d"] * labels.numel()], labels.flatten()
    return [["q"] * num_lists, *([["d"] * num_lists] * num_docs)], list(labels)


def name_of(case: Case) -> str:
    options = case.objective.describe()
    kind = type(case.objective)
    changed = [f"{value}" for name, value in options.items() if value != getattr(kind, name)]
    return " ".join([case.objective.name, *changed])


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the host")
@pytest.mark.parametrize(("num_lists", "num_docs", "rounds", "repeats"), SIZES)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_objective(compare, case, num_lists, num_docs, rounds, repeats):
    if num_docs == 1000 and case.objective.name in ("ranknet", "adr_mse"):
        rounds = 2  # whose peers store (Q, D, D) tensors
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_lists * num_docs, generator=generator).requires_grad_()
    labels = (torch.rand(num_lists, num_docs, generator=generator) < 0.15).float()
    if case.objective.name in ("listmle", "plistmle", "adr_mse"):  # an order, without ties
        labels = torch.rand(num_lists, num_docs, generator=generator)
    if case.inputs == "logits":  # of columns, of which the first is the positive's
        labels = torch.zeros(num_lists, num_docs)
        labels[:, 0] = 1
    offsets = torch.arange(num_lists + 1) * num_docs
    flat = labels.flatten()
    units = case.objective.num_units(flat.numpy(), offsets.numpy())

    def ours():
        scores.grad = None
        (case.objective(scores, flat, offsets).total / units).backward()
        return scores.grad

    def lambda_loss_of_the_same():
        scores.grad = None
        lambda_loss(scores, flat, offsets).backward()
        return scores.grad

    name = f"{name_of(case)} {num_lists} x {num_docs}"
    if case.peer is None:
        name += ", beside LambdaLoss"
        compare(name, ours, lambda_loss_of_the_same, rounds=rounds, repeats=repeats)
        return
    # The columns of a batch are a call of the model each.
    columns = case.inputs in ("columns", "logits")
    leaf = scores.detach().clone()
    if columns:
        leaf = leaf.view(num_lists, num_docs).t().contiguous()
    leaf.requires_grad_()
    peer_loss = case.peer(_Scores(leaf), **case.options)
    inputs, targets = peer_inputs(case.inputs, num_lists, num_docs, labels)

    def peer():
        leaf.grad = None
        if case.inputs == "logits":  # without the negatives that it draws from the batch
            peer_loss.calculate_loss(list(leaf), num_lists).backward()
        else:
            peer_loss(inputs, targets).backward()
        return leaf.grad

    expected = peer().t().flatten() if columns else peer()
    torch.testing.assert_close(ours(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    compare(name, ours, peer, rounds=rounds, repeats=repeats)

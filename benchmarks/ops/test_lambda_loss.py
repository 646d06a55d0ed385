"""LambdaLoss, forward and backward: against sentence-transformers' loss math as it is, against the
same formula under torch.compile, and against the bare arithmetic of its pairs."""

from __future__ import annotations

import math

import pytest
import torch
from sentence_transformers.cross_encoder.losses import LambdaLoss
from torch import nn

from rerank_fast import lambda_loss
from rerank_fast.ops import cpu
from rerank_fast.ops.lambda_loss import count_pairs


class _Scores(nn.Module):
    """Stands in for a CrossEncoder so that only the loss is timed: no text, scores are a leaf."""

    num_labels = 1

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores
        self.device = scores.device

    def preprocess(self, pairs, prompt=None, task=None):
        return {}

    def forward(self, features):
        return {"scores": self.scores}


CASES = [  # lists, documents, labels, rounds, calls in a row
    pytest.param(16, 10, "binary", 30, 200, id="loss-16x10"),
    pytest.param(64, 32, "binary", 30, 50, id="loss-64x32"),
    pytest.param(64, 100, "binary", 20, 20, id="loss-64x100"),
    pytest.param(16, 1000, "binary", 7, 1, id="loss-16x1000-binary"),
    pytest.param(16, 1000, "graded", 7, 1, id="loss-16x1000-graded"),
]


def batch(num_lists, num_docs, labels):
    """Scores (N,), labels (Q, D) and offsets (Q + 1,)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (num_lists, num_docs)
    if labels == "binary":  # 15 % positive
        target = (torch.rand(shape, generator=generator) < 0.15).float()
    else:
        target = torch.randint(0, 5, shape, generator=generator).float()
    scores = torch.randn(num_lists * num_docs, generator=generator).to(device).requires_grad_()
    return scores, target.to(device), torch.arange(num_lists + 1, device=device) * num_docs


@pytest.mark.parametrize(("num_lists", "num_docs", "labels", "rounds", "repeats"), CASES)
def test_loss(compare, num_lists, num_docs, labels, rounds, repeats):
    scores, target, offsets = batch(num_lists, num_docs, labels)
    flat = target.flatten()
    peer_loss = LambdaLoss(_Scores(scores), mini_batch_size=-1)
    inputs = [["q"] * num_lists, [["d"] * num_docs] * num_lists]
    rows = list(target)

    def ours():
        scores.grad = None
        lambda_loss(scores, flat, offsets).backward()
        return scores.grad

    def peer():
        scores.grad = None
        peer_loss(inputs, rows).backward()
        return scores.grad

    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-7)
    compare(
        f"loss {num_lists} lists x {num_docs} documents, {labels}",
        ours,
        peer,
        rounds=rounds,
        repeats=repeats,
    )


def formula(scores, labels):
    """sentence-transformers' NDCGLoss2++ of (Q, D) lists without padding, as tensors all the
    way.
    """
    num_docs = scores.shape[1]
    scores, order = scores.sort(dim=1, descending=True)
    labels = labels.gather(1, order)
    rank = torch.arange(1, num_docs + 1, device=scores.device)
    discount = torch.log2(1.0 + rank)
    gain = torch.exp2(labels) - 1
    ideal = ((torch.exp2(labels.sort(dim=1, descending=True).values) - 1) / discount).sum(
        dim=1, keepdim=True
    )
    gain = gain / ideal.clamp(min=1e-10)
    distance = (rank[:, None] - rank[None, :]).abs()
    delta = 1 / discount[(distance - 1).clamp(min=0)] - 1 / torch.log2(2.0 + distance)
    delta = delta.masked_fill(distance == 0, 0)
    swap = (1 / discount[:, None] - 1 / discount[None, :]).abs()
    weights = (10 * delta + swap) * (gain[:, :, None] - gain[:, None, :]).abs()
    mask = labels[:, :, None] > labels[:, None, :]
    losses = (
        weights
        * torch.nn.functional.logsigmoid(scores[:, :, None] - scores[:, None, :])
        / math.log(2)
    )
    return -(losses * mask).sum() / mask.sum()


@pytest.mark.parametrize(
    ("num_lists", "num_docs", "rounds", "repeats"),
    [(64, 100, 20, 10), (16, 1000, 7, 1)],
    ids=["64x100", "16x1000"],
)
def test_loss_against_torch_compile(compare, num_lists, num_docs, rounds, repeats):
    scores, target, offsets = batch(num_lists, num_docs, "binary")
    flat = target.flatten()
    compiled = torch.compile(formula, dynamic=False)

    def ours():
        scores.grad = None
        lambda_loss(scores, flat, offsets).backward()
        return scores.grad

    def peer():
        scores.grad = None
        compiled(scores.view(num_lists, num_docs), target).backward()
        return scores.grad

    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-7)
    case = f"loss {num_lists} x {num_docs} binary, peer torch.compile"
    compare(case, ours, peer, rounds=rounds, repeats=repeats)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the floor of the CPU kernel")
def test_loss_against_its_floor(compare):
    """The table's ratio is floor / op: at least 0.5 where the op takes at most twice the floor."""
    num_lists, num_docs = 16, 1000
    scores, target, offsets = batch(num_lists, num_docs, "graded")
    flat, values = target.flatten(), scores.detach()
    # As many pairs as the batch has, as a rectangle a list.
    pairs = int(count_pairs(scores, flat, offsets))
    columns = math.ceil(pairs / num_lists / num_docs / 16) * 16
    weight, pull = torch.rand(columns), torch.zeros(num_lists * num_docs)
    row_pull = torch.zeros(num_lists * num_docs, dtype=torch.float64)
    losses = torch.zeros(num_lists, dtype=torch.float64)
    exponential, reciprocal = values.exp(), (-values).exp()
    tensors = (values, exponential, reciprocal, weight, pull, row_pull, losses)

    def ours():
        scores.grad = None
        lambda_loss(scores, flat, offsets).backward()

    def floor():
        return cpu.compiled().lambda_loss_pair_floor(
            num_lists,
            num_docs,
            columns,
            *(tensor.data_ptr() for tensor in tensors),
            torch.get_num_threads(),
        )

    # The loop does the work: its loss is that of the same pairs in PyTorch.
    s = values[: num_lists * columns].view(num_lists, columns)
    rows = values.unfold(0, num_docs, columns)[:num_lists]
    expected = (
        (-torch.nn.functional.logsigmoid(rows[:, :, None] - s[:, None, :]) * weight).double().sum()
    )
    assert floor() == pytest.approx(expected.item(), rel=1e-5)
    compare(
        f"floor of {num_lists} x {num_docs} graded, peer the bare pairs", ours, floor, rounds=15
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("num_lists", "num_docs", "labels", "rounds", "repeats"), CASES)
def test_loss_on_the_device(compare_on_gpu, num_lists, num_docs, labels, rounds, repeats):
    """Forward and backward, by the device's own clock, beside sentence-transformers' loss eager and
    compiled.
    """
    scores, target, offsets = batch(num_lists, num_docs, labels)
    flat = target.flatten()
    peer_loss = LambdaLoss(_Scores(scores), mini_batch_size=-1)
    inputs, rows = [["q"] * num_lists, [["d"] * num_docs] * num_lists], list(target)

    def ours():
        return torch.autograd.grad(lambda_loss(scores, flat, offsets), scores)[0]

    def peer(loss):
        return torch.autograd.grad(loss(inputs, rows), scores)[0]

    compiled = torch.compile(peer_loss)
    torch.testing.assert_close(ours(), peer(peer_loss), rtol=1e-4, atol=1e-7)
    compare_on_gpu(
        f"loss {num_lists} x {num_docs} {labels}",
        ours,
        {"sentence-transformers": lambda: peer(peer_loss), "compiled": lambda: peer(compiled)},
        pairs=int((target[:, :, None] > target[:, None, :]).sum()),
        moved=flat.numel() * (4 + 4 + 4),  # scores and labels read, the gradient written
    )

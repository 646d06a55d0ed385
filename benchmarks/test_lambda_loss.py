"""LambdaLoss, forward and backward, against sentence-transformers' loss math."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.cross_encoder.losses import LambdaLoss
from torch import nn

from rerank_fast import lambda_loss


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


@pytest.mark.parametrize(("num_lists", "num_docs", "labels", "rounds", "repeats"), CASES)
def test_loss(compare, num_lists, num_docs, labels, rounds, repeats):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (num_lists, num_docs)
    if labels == "binary":  # 15 % positive
        target = (torch.rand(shape, generator=generator) < 0.15).float()
    else:
        target = torch.randint(0, 5, shape, generator=generator).float()
    scores = torch.randn(num_lists * num_docs, generator=generator).to(device).requires_grad_()
    flat, offsets = target.flatten().to(device), torch.arange(num_lists + 1, device=device) * num_docs
    peer_loss = LambdaLoss(_Scores(scores), mini_batch_size=-1)
    inputs = [["q"] * num_lists, [["d"] * num_docs] * num_lists]
    rows = list(target.to(device))

    def ours():
        scores.grad = None
        lambda_loss(scores, flat, offsets).backward()
        return scores.grad

    def peer():
        scores.grad = None
        peer_loss(inputs, rows).backward()
        return scores.grad

    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-7)
    compare(f"loss {num_lists} lists x {num_docs} documents, {labels}", ours, peer, rounds=rounds, repeats=repeats)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("num_lists", "num_docs", "labels", "rounds", "repeats"), CASES)
def test_loss_on_the_device(compare_on_gpu, num_lists, num_docs, labels, rounds, repeats):
    """Forward and backward, by the device's own clock, beside sentence-transformers' loss eager and compiled."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_lists, num_docs)
    if labels == "binary":  # 15 % positive
        target = (torch.rand(shape, generator=generator) < 0.15).float()
    else:
        target = torch.randint(0, 5, shape, generator=generator).float()
    scores = torch.randn(num_lists * num_docs, generator=generator).cuda().requires_grad_()
    flat, offsets = target.flatten().cuda(), (torch.arange(num_lists + 1) * num_docs).cuda()
    peer_loss = LambdaLoss(_Scores(scores), mini_batch_size=-1)
    inputs, rows = [["q"] * num_lists, [["d"] * num_docs] * num_lists], list(target.cuda())

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

"""Numbers and gradients equal sentence-transformers' losses, on the same logits, in fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder, losses
from torch import nn

from rerank_fast.objectives.adr_mse import ADRMSE
from rerank_fast.objectives.binary_cross_entropy import BinaryCrossEntropy
from rerank_fast.objectives.infonce import InfoNCE
from rerank_fast.objectives.listmle import ListMLE
from rerank_fast.objectives.listnet import ListNet
from rerank_fast.objectives.margin_mse import MarginMSE
from rerank_fast.objectives.mse import MSE
from rerank_fast.objectives.plistmle import PListMLE
from rerank_fast.objectives.ranknet import RankNet

SIZES = [3, 7, 1, 10, 32, 2]


class Logits(CrossEncoder):
    """Stands in for a CrossEncoder: a document's text is the index of its logit."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, logits):
        nn.Module.__init__(self)
        self.logits = logits

    def preprocess(self, pairs, prompt=None, task=None):
        return {"index": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features):
        return {"scores": self.logits[features["index"]][:, None]}


def listwise(peer, labels, offsets):
    """A loss of (query, documents) and a list of labels."""
    sizes = offsets.diff().tolist()
    documents = [[str(i) for i in range(a, b)] for a, b in itertools.pairwise(offsets.tolist())]
    return peer([["q"] * len(sizes), documents], list(labels.split(sizes)))


def pointwise(peer, labels, offsets):
    """A loss of (query, document) pairs and their labels."""
    return peer([["q"] * len(labels), [str(i) for i in range(len(labels))]], labels)


def columns(peer, labels, offsets):
    """A loss of query, positive, negative_1, ...: lists of one length."""
    starts, size = offsets[:-1].tolist(), int(offsets[1])
    documents = [[str(start + i) for start in starts] for i in range(size)]
    return peer([["q"] * len(starts), *documents], list(labels.view(-1, size)))


def a_list_at_a_time(peer, labels, offsets):
    """The same without in-batch negatives, which a batch of one row has none of."""
    parts = [
        peer([["q"], *([str(i)] for i in range(a, b))], labels[a:b])
        for a, b in itertools.pairwise(offsets.tolist())
    ]
    return torch.stack(parts).mean()


def grades(generator, n):
    return torch.randint(0, 4, (n,), generator=generator).float()


def teacher(generator, n):
    return torch.randn(n, generator=generator) * 4


def binary(generator, n):
    return torch.randint(0, 2, (n,), generator=generator).float()


def first(generator, n):
    """Set by the test: the first document of each list is the positive."""
    return torch.zeros(n)


def cases():
    yield "mse", MSE(), losses.MSELoss, {}, pointwise, teacher
    yield "bce", BinaryCrossEntropy(), losses.BinaryCrossEntropyLoss, {}, pointwise, binary
    weight = {"pos_weight": torch.tensor(4.0)}
    weighted = BinaryCrossEntropy(pos_weight=4.0)
    yield "bce-weighted", weighted, losses.BinaryCrossEntropyLoss, weight, pointwise, binary
    yield "margin_mse", MarginMSE(), losses.MarginMSELoss, {}, columns, teacher
    everything = {"mini_batch_size": -1}
    yield "listnet", ListNet(), losses.ListNetLoss, everything, listwise, grades
    yield "listnet-teacher", ListNet(), losses.ListNetLoss, everything, listwise, teacher
    yield "ranknet", RankNet(), losses.RankNetLoss, everything, listwise, grades
    cut = {"k": 3, "sigma": 2.0, "reduction_log": "natural"}
    yield "ranknet-cut", RankNet(**cut), losses.RankNetLoss, everything | cut, listwise, teacher
    yield "adr_mse", ADRMSE(), losses.ADRMSELoss, everything, listwise, grades
    sharp = everything | {"alpha": 4.0}
    yield "adr_mse-sharp", ADRMSE(alpha=4.0), losses.ADRMSELoss, sharp, listwise, teacher
    kept, sorted_by_label = {"respect_input_order": True}, {"respect_input_order": False}
    for name, ours, theirs in (
        ("listmle", ListMLE, losses.ListMLELoss),
        ("plistmle", PListMLE, losses.PListMLELoss),
    ):
        yield f"{name}-input", ours(**kept), theirs, everything | kept, listwise, grades
        yield f"{name}-labels", ours(), theirs, everything | sorted_by_label, listwise, teacher
    softmax = {"scale": 5.0, "activation_fn": None}
    mnrl = losses.MultipleNegativesRankingLoss
    for positives in ("each", "any"):
        ours = InfoNCE(temperature=0.2, positives=positives)
        yield f"infonce-{positives}", ours, mnrl, softmax, a_list_at_a_time, first


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "run", "draw"),
    [pytest.param(*case, id=name) for name, *case in cases()],
)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_sentence_transformers(ours, theirs, options, run, draw, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [8] * 6 if run is columns else SIZES
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    logits = torch.randn(sum(sizes), generator=generator) * 2
    labels = draw(generator, sum(sizes))
    if draw is first:
        labels[offsets[:-1]] = 1
    peer_logits, own_logits = (logits.clone().requires_grad_() for _ in range(2))
    expected = run(theirs(Logits(peer_logits), **options), labels, offsets)
    expected.backward()
    total, units = ours(own_logits, labels, offsets)
    loss = total / (ours.num_units(labels.numpy(), offsets.numpy()) if units is None else units)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    scale = peer_logits.grad.abs().max()
    assert (own_logits.grad - peer_logits.grad).abs().max() <= 1e-6 * scale


def test_listmle_of_lists_in_order_is_the_peers_default():
    """Which takes a list's order for granted: sorting a list that is sorted changes nothing."""
    offsets, logits = torch.tensor([0, 5, 9]), torch.linspace(-1, 2, 9)
    labels = torch.tensor([3.0, 2, 2, 0, 0, 1, 0, 0, 0])
    for ours, theirs in ((ListMLE(), losses.ListMLELoss), (PListMLE(), losses.PListMLELoss)):
        expected = listwise(theirs(Logits(logits), mini_batch_size=-1), labels, offsets)
        loss = ours(logits, labels, offsets).total / 2
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_infonce_of_what_the_peers_default_activation_gives():
    offsets, logits = torch.tensor([0, 5, 9]), torch.linspace(-1, 2, 9)
    labels = torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 0, 0])
    peer = losses.MultipleNegativesRankingLoss(Logits(logits))
    expected = a_list_at_a_time(peer, labels, offsets)
    loss = InfoNCE(temperature=0.1)(logits.sigmoid(), labels, offsets).total / 2
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

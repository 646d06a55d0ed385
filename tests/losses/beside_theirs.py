"""Every loss class with the data that it takes, and its batches in both packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.cross_encoder import losses as peer_losses
from torch import Tensor, nn

from rerank_fast import losses

QUERIES = ["what is a panda", "capital of france", "a long question about the weather and the sea"]
DOCUMENTS = [
    ["a panda is a bear", "a fish", "a panda is a kind of bear that eats bamboo all day long"],
    ["paris", "paris is the capital of france"],
    ["the sea is wet", "weather", "rain and wind and sun over the sea", "a bear", "no"],
]
LABELS = [[1.0, 0.0, 2.0], [0.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]]
FLAT_DOCUMENTS = [docs[:2] for docs in DOCUMENTS]
FLAT_LABELS = [[2.0, 0.0], [0.0, 1.0], [0.5, 0.25]]
POSITIVES, NEGATIVES, FURTHER = ([docs[i] for docs in DOCUMENTS] for i in (0, 1, -1))

# A batch, as columns and labels of a data set, by what the loss takes.
BATCHES: dict[str, list[tuple[dict[str, list[Any]], list[Any] | None]]] = {
    "lists": [
        ({"query": QUERIES, "docs": DOCUMENTS}, LABELS),
        ({"query": QUERIES, "docs": FLAT_DOCUMENTS}, FLAT_LABELS),
    ],
    "pairs": [({"query": QUERIES, "document": POSITIVES}, [1.0, 0.0, 0.75])],
    "margins": [
        ({"query": QUERIES, "positive": POSITIVES, "negative": NEGATIVES}, [1.5, -0.25, 0.5]),
        (
            {
                "query": QUERIES,
                "positive": POSITIVES,
                "negative_1": NEGATIVES,
                "negative_2": FURTHER,
            },
            [[1.5, 0.5], [-0.25, 2.0], [0.5, 0.0]],
        ),
        (
            {
                "query": QUERIES,
                "positive": POSITIVES,
                "negative_1": NEGATIVES,
                "negative_2": FURTHER,
            },
            [[3.0, 1.5, 0.5], [1.0, -0.25, 2.0], [0.0, 0.5, 0.0]],
        ),
    ],
    "tuples": [
        ({"anchor": QUERIES, "positive": POSITIVES}, None),
        (
            {
                "anchor": QUERIES,
                "positive": POSITIVES,
                "negative_1": NEGATIVES,
                "negative_2": FURTHER,
            },
            None,
        ),
    ],
}


Result = tuple[Tensor, dict[str, Tensor]]  # a loss, and gradients by the name of the weight


@dataclass(frozen=True)
class Case:
    """A loss class by its name, what it takes, and options, the first of them the defaults."""

    name: str
    takes: str
    options: tuple[dict[str, Any], ...] = ({},)

    def make(self, model: nn.Module, **options: Any) -> nn.Module:
        return getattr(losses, self.name)(model, **options)

    def make_theirs(self, model: nn.Module, **options: Any) -> nn.Module:
        return getattr(peer_losses, self.name)(model, **options)


SIGMOID = {"activation_fn": nn.Sigmoid()}
CASES = [
    Case(
        "BinaryCrossEntropyLoss",
        "pairs",
        ({}, SIGMOID, {"pos_weight": torch.tensor(4.0), "reduction": "sum"}),
    ),
    Case("MSELoss", "pairs", ({}, SIGMOID, {"reduction": "none"})),
    Case("MarginMSELoss", "margins", ({}, SIGMOID, {"reduction": "sum"})),
    Case(
        "MultipleNegativesRankingLoss",
        "tuples",
        (
            {},
            {"num_negatives": 1, "scale": 3},
            {"num_negatives": None, "activation_fn": None, "scale": 0},
        ),
    ),
    Case(
        "CachedMultipleNegativesRankingLoss",
        "tuples",
        ({}, {"num_negatives": 2, "mini_batch_size": 4}),
    ),
    Case("ListNetLoss", "lists", ({}, {"mini_batch_size": 4, **SIGMOID})),
    Case("ListMLELoss", "lists", ({}, {"respect_input_order": False})),
    Case(
        "PListMLELoss",
        "lists",
        ({}, {"lambda_weight": None}, {"respect_input_order": False, **SIGMOID}),
    ),
    Case("ADRMSELoss", "lists", ({}, {"alpha": 3.0, **SIGMOID})),
    Case("LambdaLoss", "lists", ({}, {"k": 2, "sigma": 2.0, **SIGMOID})),
    Case("RankNetLoss", "lists", ({}, {"k": 1, "reduction_log": "natural", "mini_batch_size": 4})),
]


def tensors(columns: dict[str, list[Any]], labels: list[Any] | None) -> tuple[list[list[Any]], Any]:
    """A batch as their trainer hands it to a loss."""
    inputs = [list(column) for column in columns.values()]
    if labels is None:
        return inputs, None
    ragged = isinstance(labels[0], list)
    return inputs, [torch.tensor(row) for row in labels] if ragged else torch.tensor(labels)


def loss_and_gradients(loss: nn.Module, inputs: list[Any], labels: Any) -> Result:
    """The value of a batch, and the gradients of its sum by the name of the weight."""
    model = loss.model
    model.zero_grad()
    torch.manual_seed(3)
    value = loss(inputs, labels)
    value.sum().backward()
    return value.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(
    ours: Result, theirs: Result, *, value: float = 1e-5, gradients: float = 1e-5
) -> None:
    """The values agree, relatively, and the gradients to that share of the largest of them."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=value, atol=value / 100)
    assert ours[1].keys() == theirs[1].keys()
    scale = max(grad.abs().max() for grad in theirs[1].values())
    assert scale > 0
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).abs().max() <= gradients * scale, name

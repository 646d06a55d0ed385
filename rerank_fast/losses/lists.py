"""Losses of labelled lists: queries, the documents of each, and a label for each document."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rerank_fast.losses.scoring import PairScoringLoss
from rerank_fast.model.texts import check_inputs, check_labels
from rerank_fast.model.tokens.packing import upload


class LabelledListsLoss(PairScoringLoss):
    """A loss of labelled lists, whose documents may differ in number; a subclass defines `_loss`.

    Raises:
        ValueError: an option that is none, or a model with more than one output label.
    """

    # As errors about a batch name the loss: in sentence-transformers a subclass has its base's.
    _name: ClassVar[str]
    _labels_expected: ClassVar[str] = (
        "expects a list of labels for each sample, but got a single value for each sample."
    )

    def __init__(self, model: nn.Module, activation_fn: nn.Module | None, **execution: Any) -> None:
        super().__init__(model, activation_fn or nn.Identity(), **execution)
        if self.model.num_labels != 1:
            raise ValueError(
                f"{type(self).__name__} supports a model with 1 output label, "
                f"but got a model with {self.model.num_labels} output labels."
            )

    def forward(
        self,
        inputs: list[list[Any]],
        labels: list[Any],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            inputs: [queries, documents]: Q queries, and for each query its list of documents.
            labels: for each query a tensor, or any sequence, with a label for each document.
            prompt: passed on to the model's preprocessing.
            task: passed on to the model's preprocessing.

        Raises:
            ValueError: labels are one tensor, inputs are not two columns, a query's documents and
                labels differ in number, a text is not valid Unicode, or a number, bytes or None
                stands in place of one; names the query and the document.
        """
        name = self._name
        if isinstance(labels, Tensor):
            raise ValueError(f"{name} {self._labels_expected}")
        if len(inputs) != 2:
            raise ValueError(
                f"{name} expects two inputs (queries, documents_list), but got {len(inputs)} "
                "inputs."
            )
        queries, documents = inputs
        if len(queries) != len(documents):
            raise ValueError(
                f"{name} got {len(queries)} queries but {len(documents)} lists of documents."
            )
        queries, documents = check_inputs(queries, documents)
        labels = [_label_tensor(values, q) for q, values in enumerate(labels)]
        docs_per_query = [len(docs) for docs in documents]
        labels_per_query = [len(values) for values in labels]
        if docs_per_query != labels_per_query:
            raise ValueError(
                f"Number of documents per query in inputs ({docs_per_query}) does not match "
                f"number of labels per query ({labels_per_query})."
            )
        pairs = [
            (query, document)
            for query, docs in zip(queries, documents, strict=True)
            for document in docs
        ]
        if not pairs:
            raise ValueError(f"{name} got a batch of {len(queries)} queries without any document.")

        scores = self._score(pairs, len(queries), prompt=prompt, task=task)
        flat_labels = upload(
            torch.cat([values.reshape(-1) for values in labels]).float(), scores.device
        )
        offsets = upload(torch.tensor([0, *docs_per_query]).cumsum(0), scores.device)
        return self._loss(scores, flat_labels, offsets)

    def _loss(
        self,
        scores: Tensor,  # (N,) fp32, activated
        labels: Tensor,  # (N,) fp32
        offsets: Tensor,  # (Q + 1,) int64
    ) -> Tensor:
        """The loss, (), of the documents of all lists, list after list; on the scores' device."""
        raise NotImplementedError


def _label_tensor(values: Any, query: int) -> Tensor:
    """(D,) labels of one query; a tensor stays where it is."""
    if isinstance(values, Tensor) and values.dim():
        return values
    return torch.tensor(check_labels(values, f"the labels of query {query}"), dtype=torch.float32)

"""Which score head a sequence-classification model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]  # (N, H) hidden states of the tokens that are read -> (N,) scores


def find_head(model: Any) -> Head | None:
    """The model's own head, applied to first tokens only; None where it is none of the known ones."""
    name = type(model).__name__
    if name == "BertForSequenceClassification":
        if model.bert.pooler is None:
            return None
        return lambda first: model.classifier(model.dropout(model.bert.pooler(first[:, None]))).squeeze(1)
    if name == "DistilBertForSequenceClassification":
        return lambda first: model.classifier(model.dropout(model.pre_classifier(first).relu())).squeeze(1)
    if name == "ModernBertForSequenceClassification":
        return lambda pooled: model.classifier(model.drop(model.head(pooled))).squeeze(1)
    if isinstance(getattr(model, "score", None), nn.Linear):
        return lambda last: model.score(last).squeeze(1)
    if hasattr(getattr(model, "classifier", None), "out_proj"):
        return lambda first: model.classifier(first[:, None]).squeeze(1)
    return None

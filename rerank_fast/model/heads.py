"""Which score head a model has: a sequence classifier's own, or the answers of a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Their logits are the last hidden states times the vocabulary and nothing else.
CAUSAL_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

Head = Callable[[Tensor], Tensor]  # (N, H) hidden states of the tokens that are read -> (N,) scores


@dataclass(frozen=True)
class Answers:
    """A causal model's score is the logit of one token, less that of another where there is one: yes less no."""

    true_token_id: int
    false_token_id: int | None = None

    def score(self, logits: Tensor) -> Tensor:
        """(N,) scores of (N, vocabulary) logits."""
        true = logits[:, self.true_token_id]
        return true if self.false_token_id is None else true - logits[:, self.false_token_id]


def find_answer_head(model: Any, answers: Answers) -> Head | None:
    """The head that multiplies with the answers' rows of the vocabulary only; None where that is not all.

    The rows are gathered here: their gradient is scattered once for all calls of the head.
    """
    vocabulary = model.get_output_embeddings()
    if type(model).__name__ not in CAUSAL_FAMILIES or type(vocabulary) is not nn.Linear:
        return None
    if not type(model).__module__.startswith("transformers.models.") or vocabulary._forward_hooks:
        return None
    ids = [answers.true_token_id] + ([] if answers.false_token_id is None else [answers.false_token_id])
    rows = F.embedding(torch.tensor(ids, device=vocabulary.weight.device), vocabulary.weight)
    bias = None if vocabulary.bias is None else vocabulary.bias[ids]

    def head(last: Tensor) -> Tensor:
        logits = F.linear(last, rows, bias)
        return logits[:, 0] if len(ids) == 1 else logits[:, 0] - logits[:, 1]

    return head


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

"""Score heads: a sequence classifier's own, or the answers of a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.gradients import leaf_for
from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.packed.linear import is_gelu
from rerank_fast.ops.choices import Activation
from rerank_fast.ops.score_head import score_head

Head = Callable[[Tensor], Tensor]  # (N, H) hidden states of the tokens that are read -> (N,) scores


@dataclass(frozen=True)
class DenseHead:
    """dense -> activation -> dropout -> out, as one op; by the model's own modules where that would
    pass one by.
    """

    own: Head
    container: nn.Module | None  # what holds dense, where that is not the model itself
    dense: nn.Module
    activation: nn.Module | Activation
    dropout: nn.Module
    out: nn.Module
    drops_input: bool  # the same dropout before dense too

    def __call__(self, first: Tensor) -> Tensor:
        activation = (
            self.activation if isinstance(self.activation, str) else _activation(self.activation)
        )
        if activation is None or not self._is_plain(first):
            return self.own(first)
        dense: Any = self.dense
        out: Any = self.out
        p: Any = self.dropout.p
        training = self.dropout.training and p > 0
        return score_head(
            first,
            None,
            dense.weight,
            dense.bias,
            out.weight,
            out.bias,
            activation=activation,
            dropout_p=p,
            dropout_in_p=p if self.drops_input else 0.0,
            training=training,
            # From torch's generator of the host, so that a saved state repeats it.
            seed=int(torch.randint(2**62, ())) if training else 0,
        )

    def _is_plain(self, first: Tensor) -> bool:
        """No adapter, hook or parametrisation stands in for a part, and there is one score in one
        dtype.
        """
        dense, dropout, out = self.dense, self.dropout, self.out
        if (
            type(dense) is not nn.Linear
            or type(out) is not nn.Linear
            or type(dropout) is not nn.Dropout
        ):
            return False
        modules = (self.container, dense, self.activation, dropout, out)
        if any(isinstance(module, nn.Module) and must_be_called(module) for module in modules):
            return False
        weights = (dense.weight, dense.bias, out.weight, out.bias)
        one_dtype = all(weight is None or weight.dtype == first.dtype for weight in weights)
        return one_dtype and out.out_features == 1 and dropout.p < 1


def _activation(module: nn.Module) -> Activation | None:
    if type(module) is nn.Tanh:
        return "tanh"
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu" if is_gelu(module) else None


@dataclass(frozen=True)
class Answers:
    """A causal model's score is the logit of one token, less that of another where there is one:
    yes less no.
    """

    true_token_id: int
    false_token_id: int | None = None

    def score(self, logits: Tensor) -> Tensor:
        """(N,) scores of (N, vocabulary) logits."""
        true = logits[:, self.true_token_id]
        return true if self.false_token_id is None else true - logits[:, self.false_token_id]


@dataclass
class AnswerHead:
    """Multiplies with the answers' rows of the vocabulary only.

    They are gathered once: their gradient is scattered once for all calls.
    """

    rows: Tensor  # (1 or 2, H)
    bias: Tensor | None
    softcap: float | None = None  # of each logit

    def __call__(self, last: Tensor) -> Tensor:
        rows, bias = self.rows.to(last.dtype), self.bias
        logits = F.linear(last, rows, None if bias is None else bias.to(last.dtype))
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits[:, 0] if len(self.rows) == 1 else logits[:, 0] - logits[:, 1]


def cut(owner: Any, name: str) -> list[tuple[Tensor, Tensor]]:
    """Put a leaf in the place of a tensor that was made from weights: (the tensor, the leaf), or
    nothing to cut.

    The leaf's .grad is what the tensor must still pass on.
    """
    shared = getattr(owner, name)
    leaf = None if shared is None else leaf_for(shared)
    if leaf is None:
        return []
    setattr(owner, name, leaf)
    return [(shared, leaf)]


def cut_head(head: Any) -> list[tuple[Tensor, Tensor]]:
    """What a head has made of weights for all its calls, cut off."""
    return [*cut(head, "rows"), *cut(head, "bias")] if isinstance(head, AnswerHead) else []


def own_class(module: nn.Module) -> type:
    """The module's class; of a sharded one that which it had before torch's fully_shard put another
    in front.
    """
    return next(
        kind
        for kind in type(module).__mro__
        if not kind.__module__.startswith("torch.distributed.")
    )

"""What trainers put around a CrossEncoder: Accelerate's mixed precision,
DistributedDataParallel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rerank_fast.model.modular.reranker import ModularReranker, output_path
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.packed.hooks import has_hooks, must_be_called

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Wrapped:
    """A CrossEncoder and what is around it.

    Attributes:
        outer: what a trainer calls; the CrossEncoder itself where nothing is around it.
        inner: the CrossEncoder, ours or that of sentence-transformers.
        model: what gives its scores: a Hugging Face model, or a ModularReranker of all its modules.
        answers: of a causal language model.
        dtype: of Accelerate's autocast around its forward; None without one.
    """

    outer: Any
    inner: Any
    model: Any
    answers: Answers | None
    dtype: torch.dtype | None

    def call(self, score: Callable[[], Tensor]) -> Tensor:
        """The scores, computed where the CrossEncoder's forward would be.

        DistributedDataParallel sums the gradients of what its own forward has seen, once.
        """
        if self.outer is self.inner:
            return score()
        before = vars(self.inner).get("forward")
        self.inner.forward = lambda features: {"scores": score()}
        try:
            return self.outer({})["scores"]
        finally:
            if before is None:
                del self.inner.forward
            else:
                self.inner.forward = before


def find_cross_encoder(model: Any) -> Wrapped | str:
    """The CrossEncoder in a model, where all it does is call its modules; else why it must be
    called itself.
    """
    inner = model
    if (
        type(model) is DistributedDataParallel
        and model.mixed_precision is None
        and not has_hooks(model)
    ):
        inner = model.module
    kind = type(inner)
    if kind.__name__ != "CrossEncoder":
        return f"the model is a {kind.__name__}, whose own forward must run"
    theirs = kind.__module__.startswith("sentence_transformers.")
    if not theirs and not kind.__module__.startswith("rerank_fast."):
        return f"the model is a CrossEncoder of {kind.__module__}, whose own forward must run"
    parts = _parts_of_theirs(inner) if theirs else (inner.model, inner.answers)
    if isinstance(parts, str):
        return parts
    dtype = None
    if "forward" in vars(inner):
        dtype = _autocast_of_accelerate(inner)
        if dtype is None:
            return "the CrossEncoder has a forward of its own, which must run"
    if has_hooks(inner):
        return "the CrossEncoder has hooks, which must run"
    gives, answers = parts
    return Wrapped(model, inner, gives, answers, dtype)


def _parts_of_theirs(inner: Any) -> tuple[Any, Answers | None] | str:
    """What gives the scores of sentence-transformers' CrossEncoder, or why that must be called
    itself.
    """
    first, *rest = inner
    kinds = [type(part).__name__ for part in inner]
    if kinds[0] != "Transformer":
        return f"the CrossEncoder begins with a {kinds[0]}, not with a Transformer"
    if called := [kind for kind, part in zip(kinds, inner, strict=True) if must_be_called(part)]:
        return f"the CrossEncoder's {called[0]} has hooks or a forward of its own, which must run"
    if first.transformer_task == "text-generation" and kinds[1:] == ["LogitScore"]:
        return first.model, Answers(rest[0].true_token_id, rest[0].false_token_id)
    if first.transformer_task == "sequence-classification" and not rest:
        return first.model, None
    text = first.modality_config.get("text", {})
    path, name = output_path(text.get("method_output_name")), first.module_output_name
    if text.get("method") != "forward" or path is None or not isinstance(name, str):
        given = text.get("method_output_name")
        return f"the CrossEncoder's Transformer gives {given} of {text.get('method')}"
    return ModularReranker(first.model, rest, output=(path, name)), None


def _autocast_of_accelerate(model: nn.Module) -> torch.dtype | None:
    """The dtype, where Accelerator.prepare has put an autocast, and no more, around the forward of
    the class.
    """
    if "_original_forward" not in vars(model) or not is_initialized():
        return None
    forward: Any = vars(model)["forward"]
    if inspect.unwrap(getattr(forward, "__func__", forward)) is not inspect.unwrap(
        type(model).forward
    ):
        return None
    return _DTYPES.get(AcceleratorState().mixed_precision)

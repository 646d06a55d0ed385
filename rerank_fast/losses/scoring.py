"""What every loss here shares: scores of the pairs of a batch, packed, in bounded memory, inside a
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rerank_fast.model.gradient_cache import CachedScores
from rerank_fast.model.preparation import prepare_packed, say_once
from rerank_fast.model.scoring import score
from rerank_fast.model.tokens.packing import TokenizedPairs, plan_micro_batches, upload
from rerank_fast.model.wrappers import find_cross_encoder
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.options import check_flag

# Pairs of a forward pass with the gradient cache, where nobody says how many.
_CACHED_MINI_BATCH = 32


class PairScoringLoss(nn.Module):
    """A loss of the scores that a CrossEncoder with one label gives the pairs of a batch.

    Tokenises all pairs of the batch once and runs the model on micro-batches of similar length,
    without padding where the model's architecture allows it.

    Args:
        model: a sentence-transformers or rerank_fast CrossEncoder.
        activation_fn: applied to the logits before the loss; None applies nothing.
        mini_batch_size: pairs per forward pass, below 0 all pairs; None or 0 leaves it to the loss,
            and with gradient_cache means 32.
        packed: run without padding where the model allows it; False calls the model itself.
        gradient_cache: score without a graph, and run micro-batch by micro-batch again in the
            backward pass, with the random numbers of its first run: memory then does not grow with
            the batch (GradCache).

    Raises:
        ValueError: an option that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_fn: nn.Module | None,
        *,
        mini_batch_size: int | None,
        packed: bool,
        gradient_cache: bool,
    ) -> None:
        super().__init__()
        check_flag("packed", packed)
        check_flag("gradient_cache", gradient_cache)
        whole = isinstance(mini_batch_size, Integral) and not isinstance(mini_batch_size, bool)
        if mini_batch_size is not None and not whole:
            raise ValueError(
                f"mini_batch_size must be None or a whole number, got {mini_batch_size!r}"
            )
        if activation_fn is not None and not callable(activation_fn):
            raise ValueError(f"activation_fn must be None or a module, got {activation_fn!r}")
        self.model: Any = model
        self.activation_fn = activation_fn
        self.mini_batch_size = mini_batch_size
        self.packed = packed
        self.gradient_cache = gradient_cache

    def _score(
        self,
        pairs: Sequence[Any],
        max_pairs: int | None = None,
        *,
        prompt: str | None,
        task: str | None,
        progress: Callable[[int], object] = lambda num_pairs: None,
    ) -> Tensor:
        """(N,) scores in the order of the pairs: fp32 logits, activated.

        max_pairs is of a forward pass where mini_batch_size does not say it; None sets no limit.
        """
        logits = self._logits(pairs, max_pairs, prompt=prompt, task=task, progress=progress).float()
        return logits if self.activation_fn is None else self.activation_fn(logits)

    def _logits(
        self,
        pairs: Sequence[Any],
        max_pairs: int | None,
        *,
        prompt: str | None,
        task: str | None,
        progress: Callable[[int], object],
    ) -> Tensor:
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        cached = self.gradient_cache and torch.is_grad_enabled() and len(weights) > 0
        if self.mini_batch_size:
            max_pairs = self.mini_batch_size if self.mini_batch_size > 0 else len(pairs)
        elif cached:
            max_pairs = _CACHED_MINI_BATCH

        def scores_of(prepared: Any, max_pairs: int | None) -> Tensor:
            if not cached:
                return score(prepared, max_pairs=max_pairs, progress=progress)
            plan = plan_micro_batches(
                prepared.tokens.lengths, max_pairs=max_pairs, padded=prepared.padded
            )
            return _RunAgain.apply(
                CachedScores(prepared, plan, prepared.device, progress), *weights
            )

        features = self.model.preprocess(pairs, prompt=prompt, task=task)
        if not _is_padded_text(features, len(pairs)):
            # Images, audio or flattened inputs can't be cut by row: leave batching to the model.
            def preprocessed(indices: np.ndarray) -> Mapping[str, Any]:
                return self.model.preprocess([pairs[i] for i in indices], prompt=prompt, task=task)

            called = _CalledPairs(self.model, _of_one_length(len(pairs)), preprocessed, cached)
            return scores_of(called, max_pairs or len(pairs))
        tokens = TokenizedPairs.from_padded(features)
        found = find_cross_encoder(self.model) if self.packed else ""
        if isinstance(found, str):
            if found:
                say_once(found)
        else:
            dtype = found.dtype or _autocast_dtype(self.model.device)
            packed = prepare_packed(found.model, tokens, dtype=dtype, answers=found.answers)
            if packed is not None:
                return found.call(lambda: scores_of(packed, max_pairs))
        called = _CalledPairs(self.model, tokens, _RowsOf(features), cached)
        return scores_of(called, max_pairs or len(pairs))


class _RunAgain(torch.autograd.Function):
    """Scores that were computed without a graph as a function of the weights.

    For autograd, and so for DistributedDataParallel, a gradient scaler and accumulation, all
    micro-batches are one operation, whose backward gives each weight its whole gradient at once.
    """

    @staticmethod
    def forward(ctx: Any, cached: CachedScores, *weights: Tensor) -> Tensor:
        ctx.cached = cached
        ctx.save_for_backward(*weights)
        return cached.scores.clone()  # what is returned gets a graph, which holds what is in ctx

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cached, weights = ctx.cached, ctx.saved_tensors
        needed = ~(gradient == 0).cpu().numpy()
        if (
            not needed.any()
        ):  # then a pair gives the weights the zeros that they have without the cache
            needed[cached.plan[-1][-1:]] = True
        gradients = _Sums([*weights, *(leaf for _, leaf in cached.shared)])
        cached.push(gradient, needed, gradients.add)
        leaves = gradients.sums[len(weights) :]
        shared = [
            (t, grad)
            for (t, _), grad in zip(cached.shared, leaves, strict=True)
            if grad is not None
        ]
        if shared:
            gradients.add([tensor for tensor, _ in shared], [grad for _, grad in shared])
        return None, *gradients.sums[: len(weights)]


class _Sums:
    """The gradients of some tensors, summed over backward passes; None for what no pass has
    reached.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.sums: list[Tensor | None] = [None] * len(tensors)

    def add(self, outputs: Any, gradient: Any) -> None:
        """Go back from an output, or several, by its gradient."""
        found = torch.autograd.grad(outputs, self.tensors, gradient, allow_unused=True)
        self.sums = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self.sums, found, strict=True)
        ]


class _CalledPairs:
    """What PackedPairs does, by calls of the CrossEncoder itself.

    Args:
        model: the CrossEncoder, in whatever is around it.
        tokens: of all pairs; their lengths order the micro-batches.
        features_of: the model's inputs of the pairs at the (M,) indices.
        cached: whether micro-batches run twice.
    """

    padded = True
    draws_by_row = False

    def __init__(
        self,
        model: Any,
        tokens: TokenizedPairs,
        features_of: Callable[[np.ndarray], Mapping[str, Any]],
        cached: bool,
    ) -> None:
        self.model, self.tokens, self.features_of = model, tokens, features_of
        self.device = device = model.device
        self.region: AbstractContextManager[object] = nullcontext()
        if cached:
            # The caller's autocast in the backward pass too. What it casts without a graph must not
            # serve the second run.
            dtype = _autocast_dtype(device)
            self.region = torch.autocast(
                device.type, dtype, enabled=dtype is not None, cache_enabled=False
            )

    def __call__(self, indices: np.ndarray, keep: np.ndarray | None = None) -> Tensor:
        features = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in self.features_of(indices).items()
        }
        scores = self.model(features)["scores"].view(-1)
        return (
            scores
            if keep is None
            else scores.index_select(0, upload(np.flatnonzero(keep), scores.device))
        )

    def separate(self) -> list[tuple[Tensor, Tensor]]:
        """Nothing: micro-batches share the weights alone."""
        return []


def _of_one_length(num_pairs: int) -> TokenizedPairs:
    """Pairs whose tokens are not known: micro-batches then keep their order."""
    return TokenizedPairs(np.zeros(0, np.int32), None, np.zeros(num_pairs + 1, np.int64))


class _RowsOf:
    """Rows of padded features, without the columns that none of them uses."""

    def __init__(self, features: Mapping[str, Any]) -> None:
        self.features = features

    def __call__(self, indices: np.ndarray) -> dict[str, Any]:
        mask, rows = self.features["attention_mask"], torch.from_numpy(indices)
        kept = _columns_in_use(mask[rows])
        return {
            key: value
            if not isinstance(value, Tensor)
            else value[rows][:, kept]
            if value.shape == mask.shape
            else value[rows]
            for key, value in self.features.items()
        }


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the caller's autocast; None outside of one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _is_padded_text(features: Mapping[str, Any], num_pairs: int) -> bool:
    """Whether every tensor of the features has a row a pair, beside a (N, T) attention mask."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != num_pairs:
        return False
    return all(
        value.dim() == 2 and value.shape[0] == num_pairs
        for value in features.values()
        if isinstance(value, Tensor)
    )


def _columns_in_use(mask: Tensor) -> slice:
    """The columns of a (B, T) attention mask between the first and the last token of any row."""
    used = mask.any(dim=0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if used.numel() else slice(0, 1)


def fullname(value: object) -> str:
    """The class of a value with its module, as a model card names it."""
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )

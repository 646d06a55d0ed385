"""Whole models: packed against padded in fp64, the gradient cache against direct, the same bits
every time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tools.gpu_parts import workloads
from benchmarks.tools.gpu_parts.results import Results
from benchmarks.tools.gpu_parts.timing import Unobserved
from benchmarks.tools.gpu_workloads import Observed, Training
from rerank_fast.model.scoring import score
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.training.run_log import Rates

_SHAPES = ("MiniLM-L12", "ModernBERT-base", "Qwen3-0.6B")
_RUNS = 20


def run(results: Results) -> None:
    shapes = ("MiniLM-L6",) if results.dry else _SHAPES
    for shape in shapes:
        against_fp64(results, shape)
    for shape in shapes[:2]:
        cached_against_direct(results, shape)
        repeated(results, shape)


def against_fp64(results: Results, shape: str) -> None:
    """Scores and the gradient of a weighted sum of them, dropout off; padded in the dtype beside
    it.
    """
    reranker = workloads.reranker_on(results.device, shape, small=results.dry)
    pairs = workloads.training_lists(shape, small=results.dry).pairs
    tokens = pairs.select(np.arange(min(10, len(pairs))))
    exact = copy.copy(reranker)
    exact._modules = {**reranker._modules, "model": copy.deepcopy(reranker.model).double()}
    true = _scores_and_gradient(exact, tokens, torch.float64, packed=False)
    for dtype in (torch.float32,) if results.dry else (torch.float32, torch.bfloat16):
        packed, padded = (
            _scores_and_gradient(reranker, tokens, dtype, packed=packed) for packed in (True, False)
        )
        for what, place in (("scores", 0), ("gradient", 1)):
            error, beside = (_distance(one[place], true[place]) for one in (packed, padded))
            # A few roundings: of the packed sums in another order than the padded ones.
            sound = error <= 1.5 * beside + 4 * torch.finfo(dtype).eps
            name = f"{shape}, {what} in {str(dtype).removeprefix('torch.')}, beside fp64"
            results.add(name, error=error, padded_error=beside, sound=bool(sound))


def _scores_and_gradient(
    reranker: Observed, tokens: TokenizedPairs, dtype: torch.dtype, *, packed: bool
) -> tuple[Tensor, Tensor]:
    scores = score(reranker.prepare(tokens, dtype=dtype, packed=packed))
    weights = torch.linspace(-1, 1, len(scores), device=scores.device, dtype=scores.dtype)
    parameters = [one for one in reranker.model.parameters() if one.requires_grad]
    gradients = torch.autograd.grad((scores * weights).sum(), parameters, allow_unused=True)
    found = [one.double().flatten() for one in gradients if one is not None]
    return scores.detach().double(), torch.cat(found)


def _distance(one: Tensor, other: Tensor) -> float:
    """As a share of the other's norm."""
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _gradient(training: Training, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    training.observer = Unobserved()
    training.backward([training.lists], training.units, Rates())
    weights = training.reranker.model.parameters()
    found = [weight.grad.clone() for weight in weights if weight.grad is not None]
    training.reranker.model.zero_grad(set_to_none=True)
    return found


def cached_against_direct(results: Results, shape: str) -> None:
    """Several micro-batches of a step in bf16, dropout as in training."""
    found: dict[Any, list[Tensor]] = {}
    for cache in ("off", "on"):
        reranker = workloads.reranker_on(results.device, shape, small=results.dry)
        lists = workloads.training_lists(shape, small=results.dry)
        training = Training(reranker, lists, cache)
        training.backward.max_tokens = len(lists.pairs.input_ids) // 3
        found[cache] = _gradient(training, 5)
    direct, cached = (torch.cat([one.flatten() for one in found[cache]]) for cache in ("off", "on"))
    distance = _distance(cached.double(), direct.double())
    results.add(f"{shape}, gradient cache beside direct", error=distance, sound=distance < 1e-3)


def repeated(results: Results, shape: str) -> None:
    """Gradients of a step and scores, each again and again."""
    small, times = results.dry, 2 if results.dry else _RUNS
    lists = workloads.training_lists(shape, small=small)
    training = Training(workloads.reranker_on(results.device, shape, small=small), lists, "off")
    first = _gradient(training, 5)
    equal = sum(_equal(_gradient(training, 5), first) for _ in range(times))
    # Without dropout attention may be torch's FlashAttention, whose backward adds with atomics.
    promised = {"sound": equal == times} if shape.startswith("MiniLM") else {}
    results.add(f"{shape}, gradients of the same bits", runs=times, equal=equal, **promised)
    reranker = workloads.reranker_on(results.device, shape, torch.bfloat16, small=small)
    pairs = workloads.inference_pairs(shape, small=small)
    scores = reranker.score_tokens(pairs)
    equal = sum(_equal([reranker.score_tokens(pairs)], [scores]) for _ in range(times))
    results.add(f"{shape}, scores of the same bits", runs=times, equal=equal, sound=equal == times)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

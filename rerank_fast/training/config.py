"""Every setting of a training run; the defaults are the published MS MARCO recipe's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_type_hints


@dataclass
class TrainingConfig:
    """Settings of a training run.

    Args:
        output: directory of the best model, its checkpoints and logs.
        overwrite: replace a model that output already holds.
        batch_size: lists per optimizer step.
        mini_batch_size: most pairs per forward pass; None leaves it to max_tokens_per_microbatch.
        max_tokens_per_microbatch: most tokens per forward pass, padding counted where there is any.
        num_epochs: passes over the lists; a fraction stops inside one.
        max_steps: optimizer steps; above 0 it replaces num_epochs.
        max_length: longest pair in tokens; None keeps the model's.
        learning_rate: peak of the schedule.
        warmup_ratio: share of the steps in which the learning rate rises.
        schedule: how it falls after that.
        weight_decay: of weight matrices; biases and norms are never decayed.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        precision: fp32, or bf16 autocast with fp32 weights. The loss is fp32 in both.
        gradient_checkpointing: recompute activations in backward: less memory, more time.
        seed: of the order of the lists, the fresh head and dropout.
        scheme: LambdaLoss weighting.
        k: LambdaLoss cut; None counts all pairs.
        sigma: LambdaLoss sigmoid slope.
        mu: share of NDCGLoss2 in ndcg2pp.
        eps: least ideal DCG.
        reduction_log: LambdaLoss logarithm.
        reduction: LambdaLoss mean: over the batch's pairs or its lists, or its sum.
        eval_steps: steps between evaluations.
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints kept, the newest.
        metric_for_best: the evaluation metric that chooses the saved model: map, mrr@K or ndcg@K, after the
            evaluator's name where it has one, as in NanoBEIR_R100_mean_ndcg@10.
        logging_steps: steps between log lines.
        show_progress_bar: one bar with loss, learning rate and pairs/s.
    """

    output: str = "reranker"
    overwrite: bool = False
    batch_size: int = 16
    mini_batch_size: int | None = None
    max_tokens_per_microbatch: int = 4096
    num_epochs: float = 1.0
    max_steps: int = -1
    max_length: int | None = None
    learning_rate: float = 2e-5
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "cosine"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    seed: int = 12
    scheme: Literal["none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"] = "ndcg2pp"
    k: int | None = None
    sigma: float = 1.0
    mu: float = 10.0
    eps: float = 1e-10
    reduction_log: Literal["binary", "natural"] = "binary"
    reduction: Literal["pairs", "lists", "sum"] = "pairs"
    eval_steps: int = 500
    save_steps: int = 500
    save_total_limit: int = 2
    metric_for_best: str = "ndcg@10"
    logging_steps: int = 10
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value out of its range."""
        for name, hint in get_type_hints(type(self)).items():
            if hint in _KINDS and not _KINDS[hint](getattr(self, name)):
                raise ValueError(f"{name} must be a finite {hint.__name__}, got {getattr(self, name)!r}")
        at_least = {
            "batch_size": 1,
            "max_tokens_per_microbatch": 1,
            "eval_steps": 1,
            "save_steps": 1,
            "save_total_limit": 1,
            "logging_steps": 1,
            "weight_decay": 0,
            "max_grad_norm": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("learning_rate", "sigma", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 4:
            raise ValueError(f"max_length must be None or at least 4, got {self.max_length}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be -1 or at least 1, got {self.max_steps}")
        if self.max_steps <= 0 and not self.num_epochs > 0:
            raise ValueError(f"num_epochs must be above 0 unless max_steps is set, got {self.num_epochs}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must be between 0 and 1, got {self.warmup_ratio}")
        choices = {
            "schedule": ("linear", "cosine"),
            "precision": ("fp32", "bf16"),
            "scheme": ("none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"),
            "reduction_log": ("binary", "natural"),
            "reduction": ("pairs", "lists", "sum"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be None or at least 1, got {self.mini_batch_size}")
        if self.k is not None and self.k < 0:
            raise ValueError(f"k must be None or at least 0, got {self.k}")
        if not re.fullmatch(r"(.+_)?(map|(mrr|ndcg)@[1-9]\d*)", self.metric_for_best):
            raise ValueError(f"metric_for_best must be map, mrr@K or ndcg@K, got {self.metric_for_best!r}")
        if not self.output:
            raise ValueError("output must name a directory")

    @property
    def at_k(self) -> int:
        """Cut of the evaluation's MRR and NDCG: metric_for_best's, else 10."""
        return int(self.metric_for_best.partition("@")[2] or 10)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS = {int: _is_integer, float: _is_finite, bool: lambda value: isinstance(value, bool)}

"""Steps by every objective, in one process or in several: torchrun -m ... MODEL DIRECTORY."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor

from rerank_fast import Trainer
from rerank_fast.objectives import NAMES
from rerank_fast.objectives.base import Objective, ObjectiveSum
from rerank_fast.objectives.combination import make_objective, make_objectives
from rerank_fast.objectives.lambda_loss import LambdaLoss
from tests.training.conftest import config_for


@dataclass(frozen=True)
class Hinge(Objective):
    """An objective of a user's own, whose documents above a label of 0 are its units."""

    margin: float = 1.0

    name: ClassVar[str] = "hinge"

    def __call__(self, scores: Tensor, labels: Tensor, offsets: Tensor) -> ObjectiveSum:
        side = torch.where(labels > 0, 1.0, -1.0)
        return ObjectiveSum((self.margin - side * scores.float()).clamp(min=0).sum())

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> int:
        return int((labels > 0).sum())


def by_gain(gain: Tensor, discount: Tensor, true_sorted: Tensor) -> Tensor:
    """A weighting of a user's own."""
    return (gain[:, :, None] - gain[:, None, :]).abs() / discount[:, :, None]


OBJECTIVES: dict[str, Objective] = {
    **{name: make_objective(name, {}) for name in NAMES},
    "lambda_loss, cut": LambdaLoss(k=2),
    "lambda_loss, own weighting": LambdaLoss(by_gain),
    "lambda_loss, own weighting, cut": LambdaLoss(by_gain, k=2),
    "ranknet, cut": make_objective("ranknet", {"k": 2}),
    "own": Hinge(),
    "several": make_objectives([{"name": "listnet"}, {"name": "lambda_loss", "weight": 0.5}]),
}


def fitting_lists(count: int = 32) -> Dataset:
    """Ragged lists whose labels fit every objective: from 0 to 1, a positive first, negatives after
    it.

    No two documents of a list are alike: a tie would be broken by rounding.
    """
    draw = np.random.default_rng(3)
    words = ["weather", "rain", "sea", "museum", "city", "panda", "bear", "fish", "sun", "wind"]
    rows = []
    for i in range(count):
        size = 14 if i % 9 == 0 else int(draw.integers(3, 7))
        docs = sorted({" ".join(draw.choice(words, int(draw.integers(2, 9)))) for _ in range(size)})
        labels = [1.0, 0.0, *draw.choice([0.0, 0.5, 1.0], len(docs)).tolist()][: len(docs)]
        rows.append({"query": f"what is the {draw.choice(words)}", "docs": docs, "labels": labels})
    return Dataset.from_list(rows)


def trained(
    model: Path, directory: Path, objective: Objective, **settings: object
) -> dict[str, Tensor]:
    """The weights after two steps of gradient descent, which an error of the loss's scale shows
    in.
    """
    config = config_for(
        directory,
        **{
            "batch_size": 32,
            "max_steps": 2,
            "optimizer": "sgd",
            "warmup_ratio": 0.0,
            "max_grad_norm": 0.0,
        },
        **{"learning_rate": 0.1, "max_tokens_per_microbatch": 256, "trackers": [], **settings},
    )
    trainer = Trainer(model, fitting_lists(), objective=objective, config=config)
    trainer.model.train()
    torch.manual_seed(5)
    for batch, _ in zip(trainer.batches(), range(2), strict=False):
        trainer.step(batch)
    return {name: weight.detach().clone() for name, weight in trainer.weights.items()}


if __name__ == "__main__":
    for name, objective in OBJECTIVES.items():
        weights = trained(Path(sys.argv[1]), Path(sys.argv[2]) / "run", objective)
        if torch.distributed.get_rank() == 0:
            save_file(weights, Path(sys.argv[2]) / f"{name}.safetensors")
    torch.distributed.destroy_process_group()

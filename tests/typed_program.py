"""What a user writes, for mypy: the public names have types under its strict flags. It is never
run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rerank_fast import CrossEncoder, Trainer, TrainingConfig, lambda_loss, ndcg
from rerank_fast.data import load_lists
from rerank_fast.evaluation import RerankingEvaluator


def train(lists: Path) -> dict[str, float]:
    model = CrossEncoder("microsoft/MiniLM-L12-H384-uncased", device="cpu")
    config = TrainingConfig(output="my-reranker", batch_size=8, precision="fp32")
    result = Trainer(model, str(lists), eval=list(load_lists(lists)), config=config).train()
    best: int = result.best_step
    return {**result.metrics, "best_step": float(best)}


def use(lists: Path) -> float:
    model = CrossEncoder("my-reranker")
    scores = model.predict([("How many people live in Berlin?", "Berlin had 3.5 million people.")])
    for hit in model.rank("How many people live in Berlin?", ["Berlin had 3.5 million people."]):
        print(hit["corpus_id"], hit["score"])
    metrics: dict[str, float] = RerankingEvaluator(list(load_lists(lists)))(model)
    return float(scores[0]) + metrics["ndcg@10"]


def loss(scores: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = lambda_loss(scores, labels, offsets, scheme="ndcg2pp", k=10)
    return value + ndcg(scores, labels, offsets, k=10).mean()

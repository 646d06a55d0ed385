"""How well a model ranks."""

from rerank_fast.evaluation.metrics import (
    Comparison,
    bootstrap_interval,
    compare,
    ranking_metrics,
    tied_pairs,
)
from rerank_fast.evaluation.nano_beir import NanoBEIREvaluator
from rerank_fast.evaluation.reranking import RerankingEvaluator

__all__ = [
    "Comparison",
    "NanoBEIREvaluator",
    "RerankingEvaluator",
    "bootstrap_interval",
    "compare",
    "ranking_metrics",
    "tied_pairs",
]

"""How well a model ranks."""

from rerank_fast.evaluation.metrics import bootstrap_interval, ranking_metrics
from rerank_fast.evaluation.reranking import RerankingEvaluator

__all__ = ["RerankingEvaluator", "bootstrap_interval", "ranking_metrics"]

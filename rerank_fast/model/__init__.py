"""Text in, scores out."""

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.packing import TokenizedPairs, plan_micro_batches

__all__ = ["CrossEncoder", "TokenizedPairs", "plan_micro_batches"]

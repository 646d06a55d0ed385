"""Hard-negative mining: retrieve, rescore, select, write ranking lists."""

from rerank_fast.data.mining.bm25 import BM25Retriever
from rerank_fast.data.mining.dense import DenseRetriever
from rerank_fast.data.mining.hard_negatives import MiningResult, mine_hard_negatives
from rerank_fast.data.mining.retrieval import Found, Retriever

__all__ = [
    "BM25Retriever",
    "DenseRetriever",
    "Found",
    "MiningResult",
    "Retriever",
    "mine_hard_negatives",
]

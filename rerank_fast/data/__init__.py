"""Rows to tokenised lists."""

from rerank_fast.data.lists import ListStream, load_lists
from rerank_fast.data.mining import BM25Retriever, DenseRetriever, MiningResult, mine_hard_negatives
from rerank_fast.data.ms_marco import load_ms_marco
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists

__all__ = [
    "BM25Retriever",
    "DenseRetriever",
    "ListStream",
    "MiningResult",
    "TokenizedLists",
    "load_lists",
    "load_ms_marco",
    "mine_hard_negatives",
    "tokenize_lists",
]

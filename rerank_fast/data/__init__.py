"""Rows to tokenised lists. Names load on first use: tokenised lists need no `datasets`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rerank_fast.data.held_out import hold_out as hold_out
    from rerank_fast.data.lists import ListStream as ListStream
    from rerank_fast.data.lists import load_lists as load_lists
    from rerank_fast.data.mining import BM25Retriever as BM25Retriever
    from rerank_fast.data.mining import DenseRetriever as DenseRetriever
    from rerank_fast.data.mining import MiningResult as MiningResult
    from rerank_fast.data.mining import mine_hard_negatives as mine_hard_negatives
    from rerank_fast.data.ms_marco import load_ms_marco as load_ms_marco
    from rerank_fast.data.tokenized import TokenizedLists as TokenizedLists
    from rerank_fast.data.tokenized import tokenize_lists as tokenize_lists

_ROOMS = {
    "BM25Retriever": "mining",
    "DenseRetriever": "mining",
    "ListStream": "lists",
    "MiningResult": "mining",
    "TokenizedLists": "tokenized",
    "hold_out": "held_out",
    "load_lists": "lists",
    "load_ms_marco": "ms_marco",
    "mine_hard_negatives": "mining",
    "tokenize_lists": "tokenized",
}

__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rerank_fast.data.{_ROOMS[name]}"), name)

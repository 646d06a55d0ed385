"""Rows to tokenised lists."""

from rerank_fast.data.lists import load_lists
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists

__all__ = ["TokenizedLists", "load_lists", "tokenize_lists"]

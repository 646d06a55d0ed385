"""Rows to tokenised lists."""

from rerank_fast.data.lists import ListStream, load_lists
from rerank_fast.data.ms_marco import load_ms_marco
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists

__all__ = ["ListStream", "TokenizedLists", "load_lists", "load_ms_marco", "tokenize_lists"]

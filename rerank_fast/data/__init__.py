"""Rows to lists: readers, validation, tokenisation ahead of training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rerank_fast.data.lists import load_lists

if TYPE_CHECKING:
    from rerank_fast.data.tokenized import TokenizedLists as TokenizedLists
    from rerank_fast.data.tokenized import tokenize_lists as tokenize_lists

__all__ = ["TokenizedLists", "load_lists", "tokenize_lists"]


def __getattr__(name: str) -> Any:
    # Tokenised lists need torch; reading lists does not.
    if name in ("TokenizedLists", "tokenize_lists"):
        return getattr(import_module("rerank_fast.data.tokenized"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

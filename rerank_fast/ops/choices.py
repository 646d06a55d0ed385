"""The words that options take, each list written here alone; reading them imports no torch."""

from __future__ import annotations

from typing import Literal

Scheme = Literal["none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp"]
ReductionLog = Literal["binary", "natural"]
# Of a loss over a batch; an op also gives each list's own.
BatchReduction = Literal["pairs", "lists", "sum"]
Reduction = Literal[BatchReduction, "none"]
Activation = Literal["tanh", "gelu", "relu", "none"]  # of a score head

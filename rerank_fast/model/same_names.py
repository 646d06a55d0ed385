"""What code reads and calls of a CrossEncoder of sentence-transformers, under its names there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rerank_fast.model.modular.reranker import ModularReranker

# What it has and this package does in another way.
_ELSEWHERE = {
    "fit": "rerank_fast.Trainer trains",
    "start_multi_process_pool": "rerank-fast score shares a file among processes",
    "add_adapter": "rerank_fast.Trainer trains one, with lora_rank",
    "load_adapter": "CrossEncoder(directory) opens an adapter's directory",
}


class _NoCardData:
    """Where sentence-transformers' evaluators put what they measured; this package's cards are the
    Trainer's.
    """

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Any, epoch: int = 0, step: int = 0
    ) -> None:
        """Nothing: they return it too."""


class SameNames:
    """Names of sentence-transformers for what a PretrainedModel has under its own."""

    model: Any
    tokenizer: Any
    max_length: int | None
    activation_fn: Callable[[Tensor], Tensor]
    save_pretrained: Callable[..., None]

    model_type, backend = "CrossEncoder", "torch"
    model_card_data = _NoCardData()

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError as error:
            if name not in _ELSEWHERE:
                raise
            raise AttributeError(f"CrossEncoder has no {name}: {_ELSEWHERE[name]}") from error

    @property
    def transformers_model(self) -> Any:
        """The Hugging Face model; of a model of modules their encoder."""
        return self.model.encoder if isinstance(self.model, ModularReranker) else self.model

    @property
    def config(self) -> Any:
        """Of the Hugging Face model."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; dtype_name is that of the arithmetic."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    @property
    def processor(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """max_length: longest pair in tokens, None for no limit."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.max_length = value

    def get_max_seq_length(self) -> int | None:
        """max_length: longest pair in tokens, None for no limit."""
        return self.max_length

    def get_backend(self) -> str:
        """What computes: torch."""
        return self.backend

    @property
    def default_activation_function(self) -> Callable[[Tensor], Tensor]:
        """activation_fn."""
        return self.activation_fn

    def set_activation_fn(self, activation_fn: Callable[[Tensor], Tensor] | None) -> None:
        """Set activation_fn; None is none at all."""
        self.activation_fn = activation_fn  # type: ignore[assignment]

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | Path | None = None) -> Any:
        """What an evaluator, this package's or sentence-transformers', measures of the model.

        Args:
            evaluator: called with the model and output_path.
            output_path: a directory for its files, made where it is not there.
        """
        if output_path is not None:
            Path(output_path).mkdir(parents=True, exist_ok=True)
        return evaluator(self, output_path)

    def save(self, path: str | Path, model_name: str | None = None, **options: Any) -> None:
        """save_pretrained."""
        self.save_pretrained(path, model_name, **options)

"""Tiny CrossEncoders of modules, made and saved by sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
)
from torch import nn

from tests.model_factory import make_tokenizer

WIDTH = 32
PAIRS = [
    ("what is a panda", "a panda is a kind of bear"),
    ("rain", ""),
    ("the sea", "the wind and the rain in paris " * 6),
    ("", "sun"),
    ("how many people live in berlin", "berlin museum"),
]
_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_MODERN = {
    "local_attention": 8,
    "global_attn_every_n_layers": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_MODERN |= {"cls_token_id": 2, "sep_token_id": 3}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": ("ModernBert", _MODERN),
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"max_position_embeddings": 65, "type_vocab_size": 2}),
    "distilbert": ("DistilBert", {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "eurobert": ("EuroBert", {}),
    "deberta": ("DebertaV2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-conv": ("DebertaV2", {"conv_kernel_size": 3}),  # of those that are padded
}


def score(width: int = WIDTH, **options: Any) -> Dense:
    options = {"activation_function": nn.Identity(), "module_output_name": "scores", **options}
    return Dense(width, 1, **options)


def ettin(pooling: str | tuple[str, ...] = "cls") -> list[nn.Module]:
    """What the Ettin rerankers have behind ModernBERT."""
    width = WIDTH * (1 if isinstance(pooling, str) else len(pooling))
    return [
        Pooling(width if isinstance(pooling, str) else WIDTH, pooling),
        Dense(width, WIDTH, activation_function=nn.GELU()),
        LayerNorm(WIDTH),
        score(),
    ]


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "score alone": lambda: [Pooling(WIDTH, "cls"), score(bias=False)],
    "dropout": lambda: [
        Pooling(WIDTH, "mean"),
        Dropout(0.3),
        Dense(WIDTH, 16),
        Dropout(0.3),
        score(16),
    ],
    "normalized": lambda: [Pooling(WIDTH, "mean"), Normalize(), score()],
    "residual": lambda: [
        Pooling(WIDTH, "cls"),
        Dense(WIDTH, WIDTH, use_residual=True),
        Dense(WIDTH, 16, activation_function=nn.ReLU(), use_residual=True),
        score(16, use_residual=True),
    ],
    "names": lambda: [
        Pooling(WIDTH, "lasttoken"),
        Dense(WIDTH, 8, module_output_name="narrow"),
        Normalize("narrow", "unit"),
        score(8, module_input_name="unit", activation_function=nn.Tanh()),
    ],
    "tokens first": lambda: [
        Dense(WIDTH, 24, activation_function=nn.SiLU(), module_input_name="token_embeddings"),
        Normalize("token_embeddings"),
        Pooling(24, "max"),
        score(24),
    ],
    "first token of tokens": lambda: [
        Dense(WIDTH, 24, module_input_name="token_embeddings"),
        Pooling(24, "cls"),
        score(24),
    ],
}
THEIRS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolutions": lambda: [CNN(WIDTH, 16, [1, 1]), Pooling(32, "mean"), score()],
    "all tokens after pooling": lambda: [
        Pooling(WIDTH, "cls"),
        Dense(WIDTH, WIDTH, module_input_name="token_embeddings"),
        Pooling(WIDTH, "mean"),
        score(),
    ],
}


def make_encoder(name: str, directory: Path) -> Path:
    kind, options = ENCODERS[name]
    tokenizer = make_tokenizer()
    if name not in ("bert", "roberta", "deberta", "deberta-conv"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = getattr(transformers, f"{kind}Config")(
        **{**_SIZES, "vocab_size": len(tokenizer), **options}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config)
    spread(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_peer(
    directory: Path, head: list[nn.Module], encoder: str = "modernbert", **options: Any
) -> Any:
    """sentence-transformers' model of an encoder and modules, saved in directory / "model"."""
    transformer = Transformer(str(make_encoder(encoder, directory / "encoder")))
    torch.manual_seed(1)
    for module in head:
        spread(module, 0.7)
    options = {"activation_fn": nn.Identity(), "device": "cpu", **options}
    peer = PeerCrossEncoder(modules=[transformer, *head], **options)
    peer.save_pretrained(str(directory / "model"))
    return peer


@torch.no_grad()
def spread(model: nn.Module, scale: float = 0.2) -> None:
    """The usual 0.02 leaves a tiny random model's scores all but equal."""
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (scale if parameter.dim() > 1 else 0.3))

"""Tiny CrossEncoders of modules, made and saved by sentence-transformers, and what is held against
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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

from rerank_fast import CrossEncoder
from rerank_fast.model import scoring
from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.tokens.packing import plan_micro_batches
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


def check_both_ways(peer: Any, directory: Path, *, packed: bool) -> CrossEncoder:
    """Scores are those of sentence-transformers, and it reads what is saved; packed, padded and
    alone.
    """
    expected = peer.predict(PAIRS)
    assert np.ptp(expected) > 0.01
    model = CrossEncoder(directory / "model", device="cpu")
    step = model.prepare(model.tokenize(PAIRS))
    assert isinstance(step, PackedPairs) is packed
    for scores in (
        model.predict(PAIRS),
        [model.predict(pair) for pair in PAIRS],
        scoring.score(model.prepare(model.tokenize(PAIRS), packed=False)).detach(),
        model.forward(model.preprocess(PAIRS))["scores"].detach(),
    ):
        np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(directory / "saved")
    theirs = PeerCrossEncoder(str(directory / "saved"), device="cpu")
    np.testing.assert_allclose(theirs.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert [type(one) for one in theirs] == [type(one) for one in peer]
    for name in ("modules.json", "sentence_bert_config.json"):
        saved, given = (
            json.loads((directory / one / name).read_text()) for one in ("saved", "model")
        )
        assert saved == given
    again = CrossEncoder(directory / "saved", device="cpu")
    np.testing.assert_array_equal(again.predict(PAIRS), model.predict(PAIRS))
    return model


def check_gradients(model: CrossEncoder) -> None:
    """Every parameter's gradient, packed, is that of the padded model, also by the gradient
    cache.
    """
    tokens = model.tokenize(PAIRS)
    upstream = torch.linspace(-1, 2, len(PAIRS))
    found = []
    plan = plan_micro_batches(tokens.lengths, max_pairs=2)
    for packed, backward in (
        (False, None),
        (True, None),
        (True, backward_direct),
        (True, backward_cached),
    ):
        model.zero_grad()
        step = model.prepare(tokens, packed=packed)
        if backward is None:
            scoring.score(step).backward(upstream)
        else:
            options = {} if backward is backward_direct else {"device": model.device}
            backward(step, plan, lambda scores: (scores * upstream).sum(), **options)
        found.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )
    expected = found[0]
    assert sum(".head." in name for name in expected) >= 1
    least = 1e-3 * max(gradient.norm() for gradient in expected.values())
    for gradients in found[1:]:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 2e-4 * max(gradient.norm(), least), name

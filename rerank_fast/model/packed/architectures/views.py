"""Where the parts of a model are that packed execution reads: views, nothing is changed in a
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rerank_fast.model.modular.pooling import Pool
from rerank_fast.model.packed.heads import Head


@dataclass(frozen=True)
class Adapter:
    """What XMOD has in a layer for a language: norm, down, activation, up, add and norm."""

    norm: nn.LayerNorm
    down: nn.Module
    activation: Callable[[Tensor], Tensor]
    up: nn.Module


@dataclass(frozen=True)
class RelativeTerms:
    """Terms of a layer's scores by the distance of query and key, as RelativePositions has them.

    Where neither key nor query is there, the embeddings are the bias: (R, heads).
    """

    slots: Callable[[torch.device], Tensor]  # (2 * reach + 1,) int32 on the device
    embeddings: nn.Embedding  # (R, H)
    norm: nn.LayerNorm | None = None  # of the embeddings
    dropout: nn.Dropout | None = None  # of the normed ones
    key: nn.Module | None = None  # makes the keys that queries meet
    query: nn.Module | None = None  # makes the queries that keys meet


@dataclass(frozen=True)
class PostNormLayer:
    """A layer as BERT has it: attention, add and norm, feed-forward, add and norm."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Module  # a Dropout, or what says whether it is training
    num_heads: int
    scale: float
    attention_out: nn.Module
    attention_out_dropout: nn.Dropout | None
    attention_norm: nn.LayerNorm
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    down_dropout: nn.Dropout | None
    output_norm: nn.LayerNorm
    attention_dropout_p: float | None = None  # where attention_dropout is no Dropout
    rotary: str | None = None  # of queries and keys
    gate: nn.Module | None = None  # the activation is its, and is multiplied with up's result
    mlp_dropout: nn.Module | None = None  # of the gated result
    adapter: Adapter | None = None  # before the last norm
    relative: RelativeTerms | None = None


@dataclass(frozen=True)
class CrossAttention:
    """A decoder's attention over the encoded text: norm, attention, add. Its heads are as many and
    as wide as those of the layer's own attention.
    """

    norm: nn.Module
    query: nn.Module
    keys_values: list[nn.Module]  # the keys', and the values'
    attention: nn.Module  # says whether it is training
    attention_dropout: float
    out: nn.Module
    out_dropout: nn.Module | None


@dataclass(frozen=True)
class PreNormLayer:
    """A layer as ModernBERT, Llama, Qwen and T5 have it: norm, attention, add; norm, feed-forward,
    add.
    """

    attention_norm: nn.Module | None
    projections: list[nn.Module]  # query, key and value, or one for all three
    num_heads: int
    num_key_value_heads: int
    head_size: int
    scale: float
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    rotary: str | None
    causal: bool
    window: tuple[int, int] | None
    attention: nn.Module  # says whether it is training
    attention_dropout: float
    attention_out: nn.Module
    attention_out_dropout: nn.Module | None
    mlp_norm: nn.Module
    gate_up: list[nn.Module]  # the gate and what it is multiplied with, or one for both
    activation: Callable[[Tensor], Tensor]
    mlp_dropout: nn.Module | None
    down: nn.Module
    down_dropout: nn.Module | None = None
    gated: bool = True  # False: gate_up is one module, and nothing is multiplied
    post_attention_norm: nn.Module | None = None  # of what attention adds
    post_mlp_norm: nn.Module | None = None  # of what the feed-forward adds
    relative: RelativeTerms | None = None  # of a layer neither causal nor with a window
    cross: CrossAttention | None = None  # between attention and feed-forward
    softcap: float | None = None  # of attention's scores


Rotary = Callable[[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Of an encoder-decoder that answers with one token: what it makes of the token it starts with
    is what the head sees.
    """

    start_token_id: int
    embed: Callable[[Tensor], Tensor]  # rows of the word embeddings, (N, H) -> (N, H)
    layers: Sequence[PreNormLayer]
    final_norm: nn.Module
    final_dropout: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class Body:
    """The parts of an encoder that runs packed."""

    word_embeddings: nn.Embedding
    # Word rows, token types, positions, all (1, T) -> (1, T, H).
    embed: Callable[[Tensor, Tensor, Tensor], Tensor]
    layers: Sequence[PostNormLayer | PreNormLayer]
    final_norm: nn.Module | None = None
    final_dropout: nn.Module | None = None
    decoder: Decoder | None = None
    rotary: Rotary | None = None  # hidden states and positions -> cosines and sines by name
    pad_position: int | None = (
        None  # RoBERTa and its kin count positions from here + 1, a padding token has this
    )
    embeddings: nn.Module | None = None  # all that embed calls, where that is one module


@dataclass(frozen=True, kw_only=True)
class HeadParts:
    """The layers of a head in the order of their calls; None, and a dropout of 0, where it has
    none.
    """

    pooling: str
    dropout_in: float = 0.0
    dense: nn.Linear | None = None
    activation: nn.Module | None = None
    norm: nn.LayerNorm | None = None
    dropout: float = 0.0
    out: nn.Linear


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a score is made of, and how."""

    head: Head
    reads: Literal["first", "last"] = "first"  # the token that the head sees
    pool: Pool | None = None  # of all tokens instead
    unread_token_id: int | None = None  # the last token is the last that is not this one
    parts: HeadParts | None = None  # of the head, where it is made of nothing else


@dataclass(frozen=True, kw_only=True)
class Architecture(Body, Reading):
    """The parts of a reranker that runs packed: those of its encoder, and how its score is read."""

    @staticmethod
    def of(body: Body, reading: Reading) -> Architecture:
        return Architecture(**vars(body), **vars(reading))

"""One layer of a packed encoder: BERT's order (norm after the sum) and the newer one (norm before the sublayer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.architectures import PostNormLayer, PreNormLayer
from rerank_fast.model.linear import StepLinear
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.varlen_attention import varlen_attention


@dataclass(frozen=True)
class MicroBatch:
    """Where the N sequences of a flat run of T tokens begin and end, and which token of each is read."""

    cu_seqlens: Tensor  # (N + 1,) int32
    one_each: Tensor  # (N + 1,) int32: 0, 1, ..., N
    read: Tensor  # (N,) int64
    rotary: dict[str, tuple[Tensor, Tensor]]  # cosines and sines (T, head size), by the name that layers give
    lengths: np.ndarray  # (N,) tokens of each, on the host: shapes there follow without asking the device

    def max_seqlens(self, *, one_query: bool) -> tuple[int, int]:
        """Most queries and keys of a sequence."""
        longest = int(self.lengths.max(initial=0))
        return 1 if one_query else longest, longest


class PostNormStep:
    """A PostNormLayer with its weights made ready for one step; one_token computes only the token that is read."""

    def __init__(self, layer: PostNormLayer, dtype: torch.dtype, num_tokens: int, *, one_token: bool) -> None:
        self.layer, self.one_token = layer, one_token
        if one_token:
            self.query = StepLinear([layer.query], dtype, 0)
            self.key_value = StepLinear([layer.key, layer.value], dtype, num_tokens)
        else:
            self.query_key_value = StepLinear([layer.query, layer.key, layer.value], dtype, num_tokens)
        self.attention_out = StepLinear([layer.attention_out], dtype, 0 if one_token else num_tokens)
        self.up = StepLinear([layer.up], dtype, 0 if one_token else num_tokens)
        self.down = StepLinear([layer.down], dtype, 0 if one_token else num_tokens)

    def __call__(self, wide: Tensor, x: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        layer, heads = self.layer, self.layer.num_heads
        cu_queries = batch.cu_seqlens
        if self.one_token:
            key, value = self.key_value(x).view(x.shape[0], 2, heads, -1).unbind(1)
            wide, x = wide[batch.read], x[batch.read]
            query = self.query(x).view(x.shape[0], heads, -1)
            cu_queries = batch.one_each
        else:
            query, key, value = self.query_key_value(x).view(x.shape[0], 3, heads, -1).unbind(1)
        attended = varlen_attention(
            query,
            key,
            value,
            cu_queries,
            batch.cu_seqlens,
            scale=layer.scale,
            max_seqlens=batch.max_seqlens(one_query=self.one_token),
            **_dropout(layer.attention_dropout),
        )
        projected = self.attention_out(attended.flatten(1))
        wide, x = _add_norm(projected, wide, layer.attention_norm, layer.attention_out_dropout)
        widened = self.down(layer.activation(self.up(x)))
        return _add_norm(widened, wide, layer.output_norm, layer.down_dropout)


def _dropout(module: nn.Module | None, p: float | None = None) -> dict[str, Any]:
    """Options of an op with a dropout of its own; its seed is drawn from torch's generator of the host.

    p is the module's own where it is a Dropout.
    """
    if module is None or not module.training:
        return {}
    p = float(module.p) if isinstance(module, nn.Dropout) else p
    if not p:
        return {}
    return {"dropout_p": p, "seed": int(torch.randint(2**62, ()))}


def _add_norm(x: Tensor, wide: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout | None) -> tuple[Tensor, Tensor]:
    """norm(wide + dropout(x)) in wide's dtype and in x's."""
    weight, bias = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
    return residual_norm(x, wide, weight, bias, eps=norm.eps, **_dropout(dropout))


class PreNormStep:
    """The same for a PreNormLayer."""

    def __init__(self, layer: PreNormLayer, dtype: torch.dtype, num_tokens: int, *, one_token: bool) -> None:
        self.layer, self.one_token, self.dtype = layer, one_token, dtype
        self.projections = StepLinear(layer.projections, dtype, num_tokens)
        self.attention_out = StepLinear([layer.attention_out], dtype, 0 if one_token else num_tokens)
        self.gate_up = StepLinear(layer.gate_up, dtype, 0 if one_token else num_tokens)
        self.down = StepLinear([layer.down], dtype, 0 if one_token else num_tokens)

    def __call__(self, wide: Tensor, x: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        layer = self.layer
        normed = wide if layer.attention_norm is None else norm(wide, layer.attention_norm)
        heads = self.projections(normed.to(self.dtype)).view(x.shape[0], -1, layer.head_size)
        query, key, value = heads.split([layer.num_heads, layer.num_key_value_heads, layer.num_key_value_heads], 1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        cos, sin = batch.rotary[layer.rotary]
        query, key = (_rotate(rows, cos, sin).to(self.dtype) for rows in (query, key))
        cu_queries, cu_keys, window = batch.cu_seqlens, batch.cu_seqlens, layer.window
        if self.one_token:
            wide, query, cu_queries = wide[batch.read], query[batch.read], batch.one_each
            if window is not None and not layer.causal:
                # The op aligns the last query with the last key; a first token sees what lies right of it.
                kept, cu_keys = _first_tokens(batch, window[1] + 1)
                key, value, window = key[kept], value[kept], None
        attended = varlen_attention(
            query,
            key,
            value,
            cu_queries,
            cu_keys,
            scale=layer.scale,
            causal=layer.causal,
            window=window,
            max_seqlens=batch.max_seqlens(one_query=self.one_token),
            **_dropout(layer.attention, layer.attention_dropout),
        )
        wide = wide + _dropped(self.attention_out(attended.flatten(1)), layer.attention_out_dropout)
        gate, up = self.gate_up(norm(wide, layer.mlp_norm).to(self.dtype)).chunk(2, dim=1)
        wide = wide + self.down(_dropped(layer.activation(gate) * up, layer.mlp_dropout))
        return wide, wide


def norm(wide: Tensor, module: nn.Module) -> Tensor:
    """The norm of the residual stream, in the stream's dtype whatever the weights'."""
    if not isinstance(module, nn.LayerNorm):
        return module(wide)
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (module.weight, module.bias))
    return F.layer_norm(wide, module.normalized_shape, weight, bias, module.eps)


def _dropped(x: Tensor, dropout: nn.Module | None) -> Tensor:
    return x if dropout is None else dropout(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (T, heads, head size), in fp32: a head's halves are pairs of coordinates."""
    left, right = x.to(cos.dtype).chunk(2, dim=2)
    return x * cos[:, None] + torch.cat([-right, left], dim=2) * sin[:, None]


def _first_tokens(batch: MicroBatch, limit: int) -> tuple[Tensor, Tensor]:
    """Places of the first tokens of every sequence, at most limit of each, and their cumulative number."""
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().clamp(max=limit).long()
    cu_kept = F.pad(lengths.cumsum(0), (1, 0))
    total = int(np.minimum(batch.lengths, limit).sum())
    place = torch.arange(total, device=starts.device)
    return place + torch.repeat_interleave(starts - cu_kept[:-1], lengths, output_size=total), cu_kept.int()

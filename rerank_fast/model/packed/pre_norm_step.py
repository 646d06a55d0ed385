"""One layer that norms before each sublayer, as ModernBERT, decoders and T5 do."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.architectures import CrossAttention, PreNormLayer
from rerank_fast.model.packed.gradients import parameters_through
from rerank_fast.model.packed.layers import (
    EncodedBatch,
    LayerBatch,
    MicroBatch,
    dropped,
    layer_batch_of,
    rotated,
    share_of,
)
from rerank_fast.model.packed.linear import NarrowCopies, StepLinear
from rerank_fast.model.packed.norm import added, norm
from rerank_fast.model.packed.pre_norm import (
    TrainedPreNorm,
    fused_layer,
)
from rerank_fast.model.packed.pre_norm_parts import TrainedParts
from rerank_fast.model.packed.relative import RelativeStep
from rerank_fast.ops.layer_kernels import kernels_for
from rerank_fast.ops.varlen_attention import own_backend_for, varlen_attention


class PreNormStep:
    """A PreNormLayer with its weights made ready for one step. The last addition to the stream is
    left to whoever follows, not yet normed: the second result.

    one_token computes only the token that is read. added_norm: of what the layer before has left to
    be added. trains: through kernels, with gradients as one function of autograd, where all parts
    are known and nothing is dropped but attention's weights. adds_gradients: see Preparer.
    """

    def __init__(
        self,
        layer: PreNormLayer,
        dtype: torch.dtype,
        num_tokens: int,
        *,
        one_token: bool,
        added_norm: nn.Module | None = None,
        copies: NarrowCopies | None = None,
        trains: bool = False,
        adds_gradients: bool = False,
    ) -> None:
        # Of the last layer most is computed for one token of each pair, of a decoder's all but keys
        # and values of the encoded text.
        few = 0 if one_token or layer.cross is not None else num_tokens
        self.layer, self.one_token, self.dtype = layer, one_token, dtype
        self.added_norm, self.adds_gradients = added_norm, adds_gradients
        # A step with gradients has one attention, also where a cache runs it first without.
        self.infers = not torch.is_grad_enabled()
        rows = num_tokens if layer.cross is None else 0
        self.projections = StepLinear(layer.projections, dtype, rows, copies=copies)
        self.attention_out = StepLinear([layer.attention_out], dtype, few, copies=copies)
        self.gate_up = StepLinear(
            layer.gate_up, dtype, few, layer.activation, copies, gated=layer.gated
        )
        self.down = StepLinear([layer.down], dtype, few, copies=copies)
        linears = [self.down, self.gate_up, self.attention_out, self.projections]
        self.cross: CrossStep | None = None
        if layer.cross is not None:
            self.cross = CrossStep(layer, layer.cross, dtype, num_tokens, copies)
        self.relative: RelativeStep | None = None
        if layer.relative is not None:
            self.relative = RelativeStep(layer.relative, layer.num_heads, dtype, copies)
        self.linears = [
            *linears,
            *(() if self.cross is None else self.cross.linears),
            *(() if self.relative is None else self.relative.linears),
        ]
        self.parts: TrainedParts | None = None
        self.trained: list[Tensor] = []  # as TrainedPreNorm takes them
        self._attention_backend: str | None = None  # the same for all that the step computes
        if trains:
            self.parts = self._find_parts(linears, copies)
        if self.parts is not None and copies is not None:
            self.weights = [one.ready[0] for one in linears]
            self.trained = [weight for one in linears for weight in one.weights]
            self.trained += [bias for one in linears for bias in one.biases]
            self.trained += self.parts.parameters

    def _find_parts(
        self, linears: list[StepLinear], copies: NarrowCopies | None
    ) -> TrainedParts | None:
        """None of a layer that is composed of its modules."""
        weight = next(self.layer.mlp_norm.parameters(), None)
        if weight is None:
            return None
        own = copies is not None and all(one.has_weight for one in linears)
        kernels = kernels_for(weight.device, self.dtype)
        if kernels is None or not (own or (self.infers and kernels.backend == "cpu")):
            return None
        made = NarrowCopies() if copies is None else copies
        parts = TrainedParts.of(self.layer, self.added_norm, made, kernels)
        if copies is None:
            made.fill()
        return parts

    def dropouts(self) -> list[float]:
        """The shares that are dropped, in the order of prepare's seeds."""
        cross, relative = self.cross, self.relative
        return [
            share_of(self.layer.attention, self.layer.attention_dropout),
            0.0 if cross is None else cross.dropout_p,
            0.0 if relative is None else relative.dropout_p,
        ]

    def prepare(self, batch: MicroBatch, seeds: list[int]) -> LayerBatch:
        layer, relative = self.layer, self.relative
        prepared = layer_batch_of(batch, seeds, one_token=self.one_token)
        if relative is not None:
            # Where the last token is read, it stands beside the last key without being told to.
            of_first = self.one_token and not batch.reads_last
            first_of = len(batch.lengths) if of_first else None
            terms = relative.prepare(batch.longest, first_of, seeds[2])
            prepared = replace(prepared, relative=terms)
        if layer.rotary is not None:
            prepared = replace(prepared, rotary=batch.rotary[layer.rotary])
        if self.one_token and not batch.reads_last and (layer.causal or layer.window is not None):
            # The op aligns the last query with the last key; a first token sees what lies right of
            # it, and itself alone where a layer is causal.
            reach = 0 if layer.causal or layer.window is None else layer.window[1]
            kept, cu_keys = _first_tokens(batch, reach + 1)
            prepared = replace(prepared, kept=kept, cu_keys=cu_keys)
        return prepared

    def options(self, batch: LayerBatch) -> tuple[Any, ...]:
        """What the unchecked attention takes behind its tensors."""
        layer = self.layer
        left, right = (-1, -1) if layer.window is None or batch.kept is not None else layer.window
        dropout_p = share_of(layer.attention, layer.attention_dropout)
        places = batch.cu_queries, batch.cu_keys, batch.rows if dropout_p > 0 else None
        assert self.parts is not None
        if self._attention_backend is None:
            backend: str = self.parts.kernels.backend
            if backend == "cpu":
                like = batch.cu_queries.new_empty(
                    0, layer.num_heads, layer.head_size, dtype=self.dtype
                )
                backend = own_backend_for(like)
            self._attention_backend = backend
        return (
            *places,
            layer.scale,
            left,
            0 if layer.causal else right,
            dropout_p,
            batch.seeds[0],
            self._attention_backend,
            layer.softcap,
        )

    def __call__(
        self, wide: Tensor, x: Tensor | None, batch: LayerBatch
    ) -> tuple[Tensor, Tensor | None]:
        layer = self.layer
        if (
            self.parts is not None
            and share_of(layer.attention_out_dropout) == share_of(layer.mlp_dropout) == 0
        ):
            if self.infers:
                reach = layer.window if batch.kept is None else None
                attend = functools.partial(self._attended, batch, reach)
                return fused_layer(self, wide, x, batch, attend)[:2]
            return TrainedPreNorm.apply(wide, x, self, batch, *parameters_through(self, wide))
        wide = wide if x is None else wide + added(x, self.added_norm)
        normed = wide if layer.attention_norm is None else norm(wide, layer.attention_norm)
        heads = self.projections(normed.to(self.dtype)).view(len(wide), -1, layer.head_size)
        query, key, value = heads.split(
            [layer.num_heads, layer.num_key_value_heads, layer.num_key_value_heads], 1
        )
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        if batch.rotary is not None:
            # Where neither was normed they lie side by side.
            if layer.query_norm is None:
                turned = rotated(
                    heads[:, : layer.num_heads + layer.num_key_value_heads], *batch.rotary
                )
                query, key = turned.split([layer.num_heads, layer.num_key_value_heads], 1)
            else:
                query, key = rotated(query, *batch.rotary), rotated(key, *batch.rotary)
        query, key = query.to(self.dtype), key.to(self.dtype)  # a norm has its weights' dtype
        window = layer.window
        if batch.read is not None:
            wide, query = wide.index_select(0, batch.read), query.index_select(0, batch.read)
        if batch.kept is not None:
            key, value = key.index_select(0, batch.kept), value.index_select(0, batch.kept)
            window = None
        (attended,) = self._attended(batch, window, query, key, value)
        summand = dropped(self.attention_out(attended.flatten(1)), layer.attention_out_dropout)
        wide = wide + added(summand, layer.post_attention_norm)
        if self.cross is not None and batch.encoded is not None:
            wide = wide + self.cross(wide, batch.encoded, batch)
        hidden = self.gate_up(norm(wide, layer.mlp_norm).to(self.dtype))
        summand = dropped(self.down(dropped(hidden, layer.mlp_dropout)), layer.down_dropout)
        return wide + added(summand, layer.post_mlp_norm), None

    def _attended(
        self,
        batch: LayerBatch,
        window: tuple[int, int] | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor]:
        """Attention by whichever backend serves best."""
        layer, relative = self.layer, None
        if self.relative is not None and batch.relative is not None:
            relative = self.relative(batch.relative)
        out = varlen_attention(
            query,
            key,
            value,
            batch.cu_queries,
            batch.cu_keys,
            scale=layer.scale,
            causal=layer.causal,
            window=window,
            dropout_p=share_of(layer.attention, layer.attention_dropout),
            seed=batch.seeds[0],
            rows=batch.rows,
            relative=relative,
            softcap=layer.softcap,
            max_seqlens=batch.max_seqlens,
        )
        return (out,)


class CrossStep:
    """A decoder layer's attention over the encoded text, its weights made ready for one step: one
    query of each sequence.
    """

    def __init__(
        self,
        layer: PreNormLayer,
        cross: CrossAttention,
        dtype: torch.dtype,
        num_tokens: int,
        copies: NarrowCopies | None,
    ) -> None:
        self.layer, self.cross, self.dtype = layer, cross, dtype
        self.query = StepLinear([cross.query], dtype, 0, copies=copies)
        self.keys_values = StepLinear(cross.keys_values, dtype, num_tokens, copies=copies)
        self.out = StepLinear([cross.out], dtype, 0, copies=copies)
        self.linears = [self.query, self.keys_values, self.out]

    @property
    def dropout_p(self) -> float:
        return share_of(self.cross.attention, self.cross.attention_dropout)

    def __call__(self, wide: Tensor, encoded: EncodedBatch, batch: LayerBatch) -> Tensor:
        """What is added to the (N, H) stream."""
        cross, layer = self.cross, self.layer
        query = self.query(norm(wide, cross.norm).to(self.dtype))
        rows = self.keys_values(encoded.states.to(self.dtype))
        key, value = rows.view(len(rows), 2, layer.num_heads, -1).unbind(1)
        attended = varlen_attention(
            query.view(len(query), layer.num_heads, -1),
            key,
            value,
            batch.cu_queries,
            encoded.cu_seqlens,
            scale=layer.scale,
            dropout_p=self.dropout_p,
            seed=batch.seeds[1],
            rows=batch.rows,
            max_seqlens=(1, encoded.longest),
        )
        return dropped(self.out(attended.flatten(1)), cross.out_dropout)


def _first_tokens(batch: MicroBatch, limit: int) -> tuple[Tensor, Tensor]:
    """Places of the first tokens of every sequence, at most limit of each, and their cumulative
    number.
    """
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().clamp(max=limit).long()
    cu_kept = F.pad(lengths.cumsum(0), (1, 0))
    total = int(np.minimum(batch.lengths, limit).sum())
    place = torch.arange(total, device=starts.device)
    return place + torch.repeat_interleave(
        starts - cu_kept[:-1], lengths, output_size=total
    ), cu_kept.int()

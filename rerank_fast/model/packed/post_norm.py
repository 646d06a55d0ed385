"""A post-norm layer that is trained, as one function of autograd: kernels called in a row, forward
and backward.

As a dozen functions its parts would each make a node and check its tensors, and the gradients of
queries, keys and values would be stacked that here lie where the next product reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rerank_fast.model.packed.gradients import pass_on
from rerank_fast.model.packed.layers import share_of
from rerank_fast.model.packed.vector_gradients import vector_gradients
from rerank_fast.ops import relative_attention, residual_norm, varlen_attention
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.relative_positions import RelativePositions

if TYPE_CHECKING:
    from rerank_fast.model.packed.layers import LayerBatch
    from rerank_fast.model.packed.norm import NormWeights
    from rerank_fast.model.packed.post_norm_step import PostNormStep


class TrainedPostNorm(torch.autograd.Function):
    """What PostNormStep computes. x is None where products read the residual stream itself; so is
    then the second result. keys, queries and bias are the relative positions' tables, all None
    where the layer has none. The parameters are the step's trained ones."""

    @staticmethod
    def forward(
        ctx: Any,
        wide: Tensor,
        x: Tensor | None,
        step: PostNormStep,
        batch: LayerBatch,
        keys: Tensor | None,
        queries: Tensor | None,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        keys_of = queries_of = wide if x is None else x
        if batch.read is not None:
            queries_of, wide = keys_of.index_select(0, batch.read), wide.index_select(0, batch.read)
        projected = [
            linear.product(rows) for linear, rows in step.projections_of(queries_of, keys_of)
        ]
        step.rotate(projected, batch)
        heads = step.heads_of(projected)
        attention, first_norm, second_norm = step.options(batch, heads[0], keys_of, wide)
        if batch.relative is None:
            attended, lse = varlen_attention.unchecked_forward(*heads, *attention)
        else:
            relative = _relative(batch, keys, queries, bias)
            *places, scale, _left, _right, dropout_p, seed, backend = attention
            attended, lse = relative_attention.unchecked_forward(
                *heads, *places, relative, scale, dropout_p, seed, backend
            )
        added = step.attention_out.product(attended.flatten(1))
        y, narrow, *stats = residual_norm.unchecked_forward(
            added, wide, *_vectors(step.attention_norm), *first_norm
        )
        hidden = step.up.product(y if x is None else narrow)
        active, kept = step.activated(hidden), None
        mlp_dropout_p = share_of(step.layer.mlp_dropout)
        if mlp_dropout_p > 0:
            active, kept = torch.native_dropout(active, mlp_dropout_p, True)
        down = step.down.product(active)
        result, result_narrow, *last_stats = residual_norm.unchecked_forward(
            down, y, *_vectors(step.output_norm), *second_norm
        )
        ctx.step, ctx.batch = step, batch
        ctx.options = attention, first_norm, second_norm, mlp_dropout_p
        ctx.is_wide = x is None
        saved = (
            keys_of,
            queries_of,
            wide,
            attended,
            lse,
            added,
            *stats,
            y,
            narrow,
            hidden,
            # Of gates one pass makes it again, of what is twice as wide.
            active if step.gate is None else None,
            kept,
            down,
        )
        # With the weights: their change would be noticed.
        saved = (*saved, *last_stats, keys, queries, bias, *heads, *step.weights)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return result, None if x is None else result_narrow

    @staticmethod
    @differentiated_once
    def backward(
        ctx: Any, d_result: Tensor | None, d_narrow: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        step: PostNormStep = ctx.step
        attention, first_norm, second_norm, mlp_dropout_p = ctx.options
        keys_of, queries_of, wide, attended, lse, added, mean, rstd, y, narrow, *saved = (
            ctx.saved_tensors
        )
        hidden, active, kept, down, last_mean, last_rstd, *saved = saved
        keys, queries, bias, q, k, v, down_weight, up_weight, out_weight, *in_weights = saved
        projections = step.projections_of(queries_of, keys_of)
        d_projected = [
            rows.new_empty(rows.shape[0], weight.shape[0])
            for (_, rows), weight in zip(projections, in_weights, strict=True)
        ]
        vectors = vector_gradients(step, wide, d_projected, second_norm[-1], attention[-1])

        norm = (step.output_norm.weight, last_mean, last_rstd)
        outer = (*norm, d_result, d_narrow, *second_norm)
        d_down, d_y = vectors.norm(step.down, down, y, *outer)
        d_active = _dropped(d_down @ down_weight, kept, mlp_dropout_p)
        d_hidden = vectors.activation(hidden, d_active)
        d_first, d_first_narrow = _through_product(d_y, d_hidden, up_weight, into_wide=ctx.is_wide)
        norm = (step.attention_norm.weight, mean, rstd)
        outer = (*norm, d_first, d_first_narrow, *first_norm)
        d_added, d_wide = vectors.norm(step.attention_out, added, wide, *outer)
        d_attended = (d_added @ out_weight).view_as(attended)
        seen = (q, k, v, attended, lse, d_attended)
        d_tables: list[Tensor | None] = [None, None, None]
        if ctx.batch.relative is None:
            vectors.attention(*seen, *attention)
        else:
            relative = _relative(ctx.batch, keys, queries, bias)
            d_tables = vectors.relative_attention(*seen, relative=relative, options=attention)
        step.rotate_back(d_projected, ctx.batch)

        if active is None:
            active = _dropped(step.activated(hidden), kept, mlp_dropout_p)
        products = [
            (step.down, d_down, active),
            (step.up, d_hidden, y if ctx.is_wide else narrow),
            (step.attention_out, d_added, attended.flatten(1)),
        ]
        for (linear, rows), grad in zip(projections, d_projected, strict=True):
            products.append((linear, grad, rows))
        weights = [
            one for linear, grad, rows in products for one in linear.weight_gradients(grad, rows)
        ]
        needs_wide, needs_x, *_ = ctx.needs_input_grad
        found = pass_on(step, [*weights, *vectors.all()], ctx.needs_input_grad[7:])
        found = [*d_tables, *found]
        if not (needs_wide or needs_x):
            return None, None, None, None, *found
        if ctx.batch.read is None:
            inputs = _through_product(d_wide, d_projected[0], in_weights[0], into_wide=ctx.is_wide)
        else:
            rows = _through_product(d_wide, d_projected[0], in_weights[0], into_wide=ctx.is_wide)
            inputs = _scattered(*rows, d_projected[1] @ in_weights[1], ctx.batch.read)
        return *inputs, None, None, *found


def _relative(
    batch: LayerBatch, keys: Tensor | None, queries: Tensor | None, bias: Tensor | None
) -> RelativePositions:
    """What the batch and the tables say of distances."""
    assert batch.relative is not None
    places = batch.relative.query_positions
    return RelativePositions(batch.relative.slots, keys, queries, bias, places)


def _dropped(x: Tensor, kept: Tensor | None, dropout_p: float) -> Tensor:
    """What forward's dropout left of x, or passes back of its gradient."""
    if kept is None:
        return x
    return torch.ops.aten.native_dropout_backward(x, kept, 1 / (1 - dropout_p))


def _vectors(norm: nn.LayerNorm | NormWeights) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def _through_product(
    d_wide: Tensor, grad: Tensor, weight: Tensor, *, into_wide: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the residual stream and of the rows beside it that a product reads.

    Where it reads the stream itself, both are one: the product adds to d_wide, which is nobody
    else's.
    """
    return (d_wide.addmm_(grad, weight), None) if into_wide else (d_wide, grad @ weight)


def _scattered(
    d_wide: Tensor, d_rows: Tensor | None, d_keys: Tensor, read: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of all tokens from those of the ones that are read, and from the keys' and
    values' of all.
    """
    if d_rows is None:
        return d_keys.index_add_(0, read, d_wide), None
    whole = d_wide.new_zeros(d_keys.shape[0], d_wide.shape[1]).index_copy_(0, read, d_wide)
    return whole, d_keys.index_add_(0, read, d_rows)

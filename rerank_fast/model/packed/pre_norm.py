"""A pre-norm layer that is trained, as one function of autograd: kernels called in a row.

Between its products lie four kernels forward and five backward; the composed layer has dozens of
operations there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from rerank_fast.model.packed.gradients import pass_on
from rerank_fast.model.packed.pre_norm_parts import Normed
from rerank_fast.ops import varlen_attention
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.layer_kernels import LayerKernels

if TYPE_CHECKING:
    from rerank_fast.model.packed.layers import LayerBatch
    from rerank_fast.model.packed.pre_norm_step import PreNormStep


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def fused_layer(
    step: PreNormStep, wide: Tensor, x: Tensor | None, batch: LayerBatch, attend: Attend
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """A layer's stream, what is still to be added to it, and what its backward reads.

    attend gives attention's result, and behind it what its own backward needs.
    """
    parts = step.parts
    assert parts is not None
    first = parts.before_attention.forward(wide, x, step.dtype)
    total = first.total
    projected = step.projections.product(first.normed)
    query, key, value = _rotated(step, projected, batch)
    if batch.kept is not None:
        key, value = key.index_select(0, batch.kept), value.index_select(0, batch.kept)
    if batch.read is not None:
        total, query = total.index_select(0, batch.read), query.index_select(0, batch.read)
    attended, *own = attend(query, key, value)
    added = step.attention_out.product(attended.flatten(1))
    last = parts.before_mlp.forward(total, added, step.dtype)
    active = gate_up = step.gate_up.product(last.normed)
    if step.gate_up.activation is not None:
        active = parts.kernels.gated(gate_up, parts.gate)
    down = step.down.product(active)
    heads = projected, query, key, value, attended
    return last.total, down, (*first, *last, gate_up, active, *heads, *own)


class TrainedPreNorm(torch.autograd.Function):
    """A layer's stream and what is still to be added to it.

    Takes them of the layer before, which has left the sum to this one's first norm: x is None where
    nothing is to be added. The parameters are the step's trained ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        wide: Tensor,
        x: Tensor | None,
        step: PreNormStep,
        batch: LayerBatch,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attention = step.options(batch)
        result, down, saved = fused_layer(
            step,
            wide,
            x,
            batch,
            lambda *heads: varlen_attention.unchecked_forward(*heads, *attention),
        )
        ctx.step, ctx.batch, ctx.options, ctx.has_x = step, batch, attention, x is not None
        # With the weights: their change would be noticed.
        ctx.save_for_backward(*saved, *step.weights)
        ctx.set_materialize_grads(False)
        return result, down

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, d_result: Tensor | None, d_down: Tensor) -> tuple[Tensor | None, ...]:
        step, batch, parts = ctx.step, ctx.batch, ctx.step.parts
        kernels: LayerKernels = parts.kernels
        saved = iter(ctx.saved_tensors)
        first, last = (Normed._make(islice(saved, len(Normed._fields))) for _ in range(2))
        gate_up, active, projected, query, key, value, attended, lse, *weights = saved
        down_weight, gate_up_weight, out_weight, projections_weight = weights
        d_gate_up = kernels.gated_grad(gate_up, d_down @ down_weight, parts.gate)
        d_added, d_total, sums = parts.before_mlp.backward(
            last, d_gate_up @ gate_up_weight, d_result, has_x=True
        )
        d_attended = (d_added @ out_weight).view_as(attended)
        seen = (query, key, value, attended, lse, d_attended)
        d_projected, head_sums = _attention_gradients(step, batch, projected, seen, ctx.options)
        if batch.read is not None:
            d_total = d_total.new_zeros(first.total.shape).index_copy_(0, batch.read, d_total)
        d_x, d_wide, first_sums = parts.before_attention.backward(
            first, d_projected @ projections_weight, d_total, has_x=ctx.has_x
        )
        vectors = parts.gradients(sums, first_sums, head_sums)
        products = (
            (step.down, d_down, active),
            (step.gate_up, d_gate_up, last.normed),
            (step.attention_out, d_added, attended.flatten(1)),
            (step.projections, d_projected, first.normed),
        )
        d_weights = [
            one for linear, grad, rows in products for one in linear.weight_gradients(grad, rows)
        ]
        d_biases = [one for linear, grad, _ in products for one in linear.bias_gradients(grad)]
        found = pass_on(step, [*d_weights, *d_biases, *vectors], ctx.needs_input_grad[4:])
        return d_wide, d_x, None, None, *found


def _rotated(
    step: PreNormStep, projected: Tensor, batch: LayerBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, heads, head size) queries, keys and values, where they are but for a backward pass
    through norms of the heads.
    """
    parts, layer = step.parts, step.layer
    assert parts is not None
    assert batch.rotary is not None
    turned, values = _turned(step, projected)
    in_place = parts.head_weights is None or (step.infers and parts.kernels.backend == "cpu")
    out = turned if in_place else torch.empty_like(turned)
    parts.kernels.rotary(
        turned, out, *batch.rotary, parts.head_weights, layer.num_heads, parts.head_eps
    )
    query, key = out.split([layer.num_heads, layer.num_key_value_heads], 1)
    return query, key, values


def _turned(step: PreNormStep, projected: Tensor) -> Any:
    """(T, heads, head size) what is rotated, the queries and behind them the keys, and the
    values.
    """
    layer = step.layer
    heads = projected.view(len(projected), -1, layer.head_size)
    return heads.split([layer.num_heads + layer.num_key_value_heads, layer.num_key_value_heads], 1)


def _attention_gradients(
    step: PreNormStep,
    batch: LayerBatch,
    projected: Tensor,
    saved: tuple[Tensor, ...],
    options: Sequence[Any],
) -> tuple[Tensor, Tensor | None]:
    """The gradient of what is projected, and rows of sums of that of the heads' norms."""
    parts, layer = step.parts, step.layer
    assert parts is not None
    assert batch.rotary is not None
    d_projected = torch.empty_like(projected)
    d_turned, d_value = _turned(step, d_projected)
    wholes = (*d_turned.split([layer.num_heads, layer.num_key_value_heads], 1), d_value)
    places = (batch.read, batch.kept, batch.kept)
    grads = [
        whole if place is None else torch.empty_like(one)
        for whole, place, one in zip(wholes, places, saved[:3], strict=True)
    ]
    *options, softcap = options
    varlen_attention.unchecked_backward(*saved, *options, softcap=softcap, into=grads)
    for whole, place, grad in zip(wholes, places, grads, strict=True):
        if place is not None:
            whole.zero_().index_copy_(0, place, grad)
    before = None if parts.head_weights is None else _turned(step, projected)[0]
    sums = parts.kernels.rotary_grad(
        d_turned, before, *batch.rotary, parts.head_weights, layer.num_heads, parts.head_eps
    )
    return d_projected, None if parts.head_weights is None else sums

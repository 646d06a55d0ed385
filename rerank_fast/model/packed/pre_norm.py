"""A pre-norm layer that is trained, as one function of autograd: kernels called in a row.

Between its products lie four kernels forward and five backward; the composed layer has dozens of
operations there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.architectures import PreNormLayer
from rerank_fast.model.packed.linear import (
    NarrowCopies,
    is_gelu,
    must_be_called,
    pass_on,
)
from rerank_fast.ops import varlen_attention
from rerank_fast.ops.cpu import pre_norm as cpu
from rerank_fast.ops.differentiated_once import differentiated_once
from rerank_fast.ops.pre_norm import PreNormKernels, kernels_of
from rerank_fast.ops.registry import HAS_TRITON

if TYPE_CHECKING:
    from rerank_fast.model.packed.layers import LayerBatch
    from rerank_fast.model.packed.pre_norm_step import PreNormStep

_MAX_WIDTH, _MAX_HEAD_SIZE = 4096, 256  # of Triton's kernels


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's run on a device; a meta tensor stands for a GPU's."""
    return (
        device.type in ("cuda", "meta") and HAS_TRITON and dtype.itemsize <= torch.float32.itemsize
    )


def kernels_on_host(device: torch.device, dtype: torch.dtype) -> PreNormKernels | None:
    """Those of a CPU; None where they don't run."""
    return kernels_of("cpu") if cpu.serves(device, dtype) else None


@dataclass(frozen=True)
class TrainedNorm:
    """A LayerNorm or RMSNorm of the residual stream, its weights ready in fp32."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool  # a LayerNorm
    parameters: list[Tensor]  # the module's own

    @staticmethod
    def of(module: nn.Module, copies: NarrowCopies) -> TrainedNorm | None:
        """None of a module that is neither, or must be called."""
        if must_be_called(module):
            return None
        parameters: list[Tensor]
        rms, plus = rms_norm(module), 0.0
        if type(module) is nn.LayerNorm:
            parameters, eps = (
                [one for one in (module.weight, module.bias) if one is not None],
                module.eps,
            )
        elif rms is not None:
            parameters, eps, plus = [rms.weight], rms.eps, rms.plus
        else:
            return None
        if not parameters or parameters[0].numel() > _MAX_WIDTH:
            return None
        weight, bias = [
            *(copies.joined([one], torch.float32, plus=plus) for one in parameters),
            None,
        ][:2]
        assert weight is not None
        return TrainedNorm(weight, bias, eps, type(module) is nn.LayerNorm, parameters)

    def sums_for(self, num_rows: int, programs: Callable[[int], int]) -> Tensor:
        """Room for what add_norm_grads leaves."""
        width = len(self.weight) * (2 if self.centered else 1)
        return self.weight.new_empty(programs(num_rows), width)

    def gradients(self, sums: Tensor) -> list[Tensor]:
        """Of its parameters, from the sums over all rows of weight's gradient and, behind it, the
        bias's.
        """
        return list(sums.split(len(self.weight)))[: len(self.parameters)]


# transformers' own: their eps is variance_epsilon, and weight what rows are multiplied with.
_RMS_NORMS = [
    f"transformers.models.{family}.modeling_{family}.{name}RMSNorm"
    for family, name in (
        ("llama", "Llama"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
        ("mistral", "Mistral"),
        ("eurobert", "EuroBert"),
    )
]
_GEMMAS = [  # theirs is eps, and rows are multiplied with 1 + weight
    "transformers.models.gemma.modeling_gemma.GemmaRMSNorm",
    "transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm",
    "transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm",
]


@dataclass(frozen=True)
class RMSNorm:
    """Rows over their root mean square, times plus + weight."""

    weight: Tensor
    eps: float
    plus: float


def rms_norm(module: Any) -> RMSNorm | None:
    """A norm of transformers that is one; None for another."""
    path = f"{type(module).__module__}.{type(module).__name__}"
    if path in _RMS_NORMS:
        return RMSNorm(module.weight, float(module.variance_epsilon), 0.0)
    return RMSNorm(module.weight, float(module.eps), 1.0) if path in _GEMMAS else None


_GATES = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",  # as it was called
}


def gate_of(activation: object) -> str | None:
    """The name that the gated kernels have for an activation; None where they have none."""
    if isinstance(activation, nn.Module) and must_be_called(activation):
        return None
    if is_gelu(activation) and getattr(activation, "act", F.gelu) is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU and activation.approximate == "tanh":
        return "gelu_tanh"
    return _GATES.get(f"{type(activation).__module__}.{type(activation).__name__}")


@dataclass(frozen=True)
class TrainedParts:
    """What TrainedPreNorm needs of a layer beside its products."""

    kernels: PreNormKernels

    attention_norm: TrainedNorm | None  # None: ModernBERT's first layer
    mlp_norm: TrainedNorm
    head_weights: Tensor | None  # (2 x head size,) fp32 of the queries' and the keys' norm
    head_parameters: list[Tensor]
    head_eps: float
    gate: str

    @staticmethod
    def of(
        layer: PreNormLayer, copies: NarrowCopies, kernels: PreNormKernels
    ) -> TrainedParts | None:
        """None of a layer that has a part without a kernel."""
        gate = gate_of(layer.activation)
        mlp_norm = TrainedNorm.of(layer.mlp_norm, copies)
        attention_norm = (
            None if layer.attention_norm is None else TrainedNorm.of(layer.attention_norm, copies)
        )
        if (
            gate is None
            or mlp_norm is None
            or (attention_norm is None) != (layer.attention_norm is None)
        ):
            return None
        more = (layer.post_attention_norm, layer.post_mlp_norm, layer.down_dropout, layer.softcap)
        if layer.rotary is None or not layer.gated or any(one is not None for one in more):
            return None
        if layer.head_size > _MAX_HEAD_SIZE or layer.head_size % 2:
            return None
        heads = [one for one in (layer.query_norm, layer.key_norm) if one is not None]
        if not heads:
            return TrainedParts(kernels, attention_norm, mlp_norm, None, [], 0.0, gate)
        norms = [one for one in map(rms_norm, heads) if one is not None]
        if len(norms) < 2 or any(map(must_be_called, heads)):
            return None
        weights = [one.weight for one in norms]
        kinds = {(one.eps, one.plus) for one in norms}
        if len(kinds) > 1 or {one.shape for one in weights} != {(layer.head_size,)}:
            return None
        ((eps, plus),) = kinds
        joined = copies.joined(weights, torch.float32, plus=plus)
        return TrainedParts(kernels, attention_norm, mlp_norm, joined, weights, eps, gate)

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the vectors, in the order of their gradients."""
        first = [] if self.attention_norm is None else self.attention_norm.parameters
        return [*self.mlp_norm.parameters, *first, *self.head_parameters]

    def gradients(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Of these, from what the kernels left: of both norms and of the heads' norms, summed."""
        first = [] if self.attention_norm is None else self.attention_norm.gradients(sums[1])
        heads = sums[2].split(len(sums[2]) // 2) if self.head_parameters else ()
        return [*self.mlp_norm.gradients(sums[0]), *first, *heads]


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def fused_layer(
    step: PreNormStep, wide: Tensor, x: Tensor | None, batch: LayerBatch, attend: Attend
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A layer's stream, what is still to be added to it, and what its backward reads.

    attend gives attention's result, and behind it what its own backward needs.
    """
    parts = step.parts
    assert parts is not None
    total, normed, *stats = _add_norm(parts.kernels, wide, x, parts.attention_norm, step.dtype)
    projected = step.projections.product(normed)
    query, key, value = _rotated(step, projected, batch)
    if batch.kept is not None:
        key, value = key.index_select(0, batch.kept), value.index_select(0, batch.kept)
    total_read = total
    if batch.read is not None:
        total_read, query = total.index_select(0, batch.read), query.index_select(0, batch.read)
    attended, *own = attend(query, key, value)
    added = step.attention_out.product(attended.flatten(1))
    result, last_normed, *last_stats = _add_norm(
        parts.kernels, total_read, added, parts.mlp_norm, step.dtype
    )
    active = gate_up = step.gate_up.product(last_normed)
    if step.gate_up.activation is not None:
        active = parts.kernels.gated(gate_up, parts.gate)
    down = step.down.product(active)
    saved = (total, normed, *stats, projected, query, key, value, attended, *own)
    return result, down, (*saved, result, last_normed, *last_stats, gate_up, active)


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
        kernels: PreNormKernels = parts.kernels
        total, normed, mean, rstd, projected, query, key, value, attended, lse, *saved = (
            ctx.saved_tensors
        )
        result, last_normed, last_mean, last_rstd, gate_up, active, *weights = saved
        down_weight, gate_up_weight, out_weight, projections_weight = weights
        d_gate_up = kernels.gated_grad(gate_up, d_down @ down_weight, parts.gate)
        sums = parts.mlp_norm.sums_for(len(result), kernels.programs)
        norm = (parts.mlp_norm.weight, last_mean, last_rstd)
        d_last_normed = d_gate_up @ gate_up_weight
        d_added, d_total = kernels.add_norm_grads(
            result, *norm, d_last_normed, d_result, sums, True
        )
        d_attended = (d_added @ out_weight).view_as(attended)
        saved = (query, key, value, attended, lse, d_attended)
        d_projected, head_sums = _attention_gradients(step, batch, projected, saved, ctx.options)
        if batch.read is not None:
            d_total = d_total.new_zeros(total.shape).index_copy_(0, batch.read, d_total)
        d_normed = d_projected @ projections_weight
        d_x, d_wide, first_sums = None, d_total, None
        if parts.attention_norm is None:
            d_wide = d_total.add_(d_normed)
            d_x = d_wide.to(d_normed.dtype) if ctx.has_x else None
        else:
            first_sums = parts.attention_norm.sums_for(len(total), kernels.programs)
            norm = (parts.attention_norm.weight, mean, rstd)
            d_x, d_wide = kernels.add_norm_grads(
                total, *norm, d_normed, d_total, first_sums, ctx.has_x
            )
        matrices = sums, first_sums, head_sums
        widths = [0 if one is None else one.shape[1] for one in matrices]
        vectors = parts.gradients(kernels.column_sums(*matrices).split(widths))
        products = (
            (step.down, d_down, active),
            (step.gate_up, d_gate_up, last_normed),
            (step.attention_out, d_added, attended.flatten(1)),
            (step.projections, d_projected, normed),
        )
        d_weights = [
            one for linear, grad, rows in products for one in linear.weight_gradients(grad, rows)
        ]
        d_biases = [one for linear, grad, _ in products for one in linear.bias_gradients(grad)]
        found = pass_on(step, [*d_weights, *d_biases, *vectors], ctx.needs_input_grad[4:])
        return d_wide, d_x if ctx.has_x else None, None, None, *found


def _add_norm(
    kernels: PreNormKernels,
    wide: Tensor,
    x: Tensor | None,
    norm: TrainedNorm | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream with x added to it, its norm in the products' dtype, and what backward needs of
    it.
    """
    if norm is None:
        total, empty = wide if x is None else wide + x, wide.new_empty(0)
        return total, total.to(dtype), empty, empty
    total, *rest = kernels.add_norm(wide, x, norm.weight, norm.bias, norm.eps, norm.centered, dtype)
    return (wide if x is None else total), *rest


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
    options: tuple[Any, ...],
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
    varlen_attention.unchecked_backward(*saved, *options, into=grads)
    for whole, place, grad in zip(wholes, places, grads, strict=True):
        if place is not None:
            whole.zero_().index_copy_(0, place, grad)
    before = None if parts.head_weights is None else _turned(step, projected)[0]
    sums = parts.kernels.rotary_grad(
        d_turned, before, *batch.rotary, parts.head_weights, layer.num_heads, parts.head_eps
    )
    return d_projected, None if parts.head_weights is None else sums

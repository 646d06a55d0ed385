"""What the kernels of a pre-norm layer need of its modules: norms, gates and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.architectures import PreNormLayer
from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.packed.linear import NarrowCopies, is_gelu
from rerank_fast.ops.layer_kernels import LayerKernels

_MAX_WIDTH, _MAX_HEAD_SIZE = 4096, 256  # of Triton's kernels


@dataclass(frozen=True)
class TrainedNorm:
    """A LayerNorm or RMSNorm of rows, its weights ready in fp32."""

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


class Normed(NamedTuple):
    """What AddNorm gives, and with it what its backward reads."""

    total: Tensor  # (T, H) fp32
    normed: Tensor  # (T, H) in the products' dtype
    mean: Tensor  # (T,) of what was normed, empty without a LayerNorm
    rstd: Tensor  # (T,)
    x: Tensor | None  # (T, H) where it was normed itself
    x_rstd: Tensor  # (T,), or empty


@dataclass(frozen=True)
class AddNorm:
    """What stands before a sublayer: x is added to the stream, and the sum is normed.

    norm: None in ModernBERT's first layer, whose products read the stream. added: norms x before it
    is added, as Gemma 2 does.
    """

    kernels: LayerKernels
    norm: TrainedNorm | None
    added: TrainedNorm | None

    @staticmethod
    def of(
        norm: nn.Module | None,
        added: nn.Module | None,
        copies: NarrowCopies,
        kernels: LayerKernels,
    ) -> AddNorm | None:
        """None of modules that have no kernel."""
        modules = norm, added
        found = [None if one is None else TrainedNorm.of(one, copies) for one in modules]
        if [one is None for one in found] != [one is None for one in modules]:
            return None
        ready, of_x = found
        if of_x is not None and (ready is None or of_x.centered):
            return None
        return AddNorm(kernels, ready, of_x)

    def forward(self, wide: Tensor, x: Tensor | None, dtype: torch.dtype) -> Normed:
        """Of the (T, H) fp32 stream, and x where something is to be added."""
        norm, added = self.norm, None if x is None else self.added
        if norm is None:
            total, empty = wide if x is None else wide + x, wide.new_empty(0)
            return Normed(total, total.to(dtype), empty, empty, None, empty)
        of_x = (None, 0.0) if added is None else (added.weight, added.eps)
        total, normed, mean, rstd, x_rstd = self.kernels.add_norm(
            wide, x, norm.weight, norm.bias, norm.eps, norm.centered, dtype, *of_x
        )
        kept = None if added is None else x
        return Normed(wide if x is None else total, normed, mean, rstd, kept, x_rstd)

    def backward(
        self, found: Normed, grad_normed: Tensor, grad_total: Tensor | None, *, has_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The gradients of x and the stream, and rows of sums of the parameters'."""
        if self.norm is None:
            assert grad_total is not None
            d_wide = grad_total.add_(grad_normed)
            return d_wide.to(grad_normed.dtype) if has_x else None, d_wide, None
        weight = self.norm.weight
        of_x: list[Tensor | None] = [None, None, None]
        if found.x is not None and self.added is not None:
            of_x = [found.x, self.added.weight, found.x_rstd]
        vectors = 1 + self.norm.centered + (found.x is not None)
        programs = self.kernels.programs(len(found.total))
        sums = weight.new_empty(programs, vectors * len(weight))
        given = found.total, weight, found.mean, found.rstd, grad_normed, grad_total
        d_x, d_wide = self.kernels.add_norm_grads(*given, sums, has_x, *of_x)
        return d_x if has_x else None, d_wide, sums

    @property
    def parameters(self) -> list[Tensor]:
        """The modules' own."""
        return [weight for one in (self.norm, self.added) if one for weight in one.parameters]

    def gradients(self, sums: Tensor) -> list[Tensor | None]:
        """Of the parameters, from the sums over all rows of those that backward left."""
        if self.norm is None:
            return []
        vectors = sums.split(len(self.norm.weight))
        found: list[Tensor | None] = [*vectors[: len(self.norm.parameters)]]
        if self.added is not None:
            found.append(vectors[-1] if len(vectors) > 1 + self.norm.centered else None)
        return found


@dataclass(frozen=True)
class TrainedParts:
    """What TrainedPreNorm needs of a layer beside its products."""

    kernels: LayerKernels
    before_attention: AddNorm
    before_mlp: AddNorm
    head_weights: Tensor | None  # (2 x head size,) fp32 of the queries' and the keys' norm
    head_parameters: list[Tensor]
    head_eps: float
    gate: str

    @staticmethod
    def of(
        layer: PreNormLayer,
        added_norm: nn.Module | None,
        copies: NarrowCopies,
        kernels: LayerKernels,
    ) -> TrainedParts | None:
        """None of a layer that has a part without a kernel.

        added_norm: of what the layer before has left to be added.
        """
        gate = gate_of(layer.activation)
        first = AddNorm.of(layer.attention_norm, added_norm, copies, kernels)
        last = AddNorm.of(layer.mlp_norm, layer.post_attention_norm, copies, kernels)
        if gate is None or first is None or last is None:
            return None
        if layer.rotary is None or not layer.gated or layer.down_dropout is not None:
            return None
        if layer.head_size > _MAX_HEAD_SIZE or layer.head_size % 2:
            return None
        heads = [one for one in (layer.query_norm, layer.key_norm) if one is not None]
        if not heads:
            return TrainedParts(kernels, first, last, None, [], 0.0, gate)
        norms = [one for one in map(rms_norm, heads) if one is not None]
        if len(norms) < 2 or any(map(must_be_called, heads)):
            return None
        weights = [one.weight for one in norms]
        kinds = {(one.eps, one.plus) for one in norms}
        if len(kinds) > 1 or {one.shape for one in weights} != {(layer.head_size,)}:
            return None
        ((eps, plus),) = kinds
        joined = copies.joined(weights, torch.float32, plus=plus)
        return TrainedParts(kernels, first, last, joined, weights, eps, gate)

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the vectors, in the order of their gradients."""
        first, last = self.before_attention, self.before_mlp
        return [*last.parameters, *first.parameters, *self.head_parameters]

    def gradients(self, *sums: Tensor | None) -> list[Tensor | None]:
        """Of these, from rows of sums that the kernels left: of what stands before the
        feed-forward, of what stands before attention, and of the heads' norms.
        """
        widths = [0 if one is None else one.shape[1] for one in sums]
        last, first, heads = self.kernels.column_sums(*sums).split(widths)
        found = [*self.before_mlp.gradients(last), *self.before_attention.gradients(first)]
        return [*found, *(heads.chunk(2) if self.head_parameters else ())]

"""Padding-free execution of Hugging Face encoders: flat runs of tokens, and a last layer for first tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rerank_fast.model.architectures import Architecture, PostNormLayer
from rerank_fast.model.packing import MAX_TOKENS, TokenizedPairs
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.varlen_attention import varlen_attention


class _NarrowLinear(torch.autograd.Function):
    """A product in bf16 whose weight gradients reach the fp32 weight in fp32.

    The bf16 copy is made once a step and shared by its micro-batches; were it part of the graph, their gradients
    would be added up in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, narrow_weight: Tensor, narrow_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, narrow_weight)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, narrow_weight, narrow_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow_weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad @ narrow_weight if wants_x else None,
            (grad.t() @ x).to(weight_dtype) if wants_weight else None,
            grad.sum(0).to(bias_dtype) if wants_bias else None,
            None,
            None,
        )


# oneDNN's product, without a gradient. F.linear sends fp32 to MKL, which is half as fast on AMD's processors, and
# lays bf16 weights out anew in every call.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _Linear:
    """One or more linear modules that read the same rows, as one product; weights are cast once."""

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, num_tokens: int) -> None:
        self.modules: Sequence[nn.Module] | None = None
        if not all(type(module) is nn.Linear and not _has_hooks(module) for module in modules):
            self.modules = modules  # an adapter's, or hooked: it must be called
            return
        weights: list[Any] = [module.weight for module in modules]
        biases: list[Any] = [module.bias for module in modules]
        self.weight: Tensor = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias: Tensor | None = None
        if biases[0] is not None:
            self.bias = biases[0] if len(biases) == 1 else torch.cat(biases)
        self.narrow = None
        if self.weight.dtype != dtype:
            self.narrow = (
                self.weight.detach().to(dtype),
                None if self.bias is None else self.bias.detach().to(dtype),
            )
        self.inference: tuple[Tensor, Tensor | None] | None = None
        on_cpu = self.weight.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        if _ONEDNN and on_cpu and not torch.is_grad_enabled():
            weight, bias = self.narrow or (self.weight, self.bias)
            if num_tokens > MAX_TOKENS:  # worth the new layout
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, MAX_TOKENS)
            self.inference = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if self.modules is not None:
            with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
                outputs = [module(x) for module in self.modules]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if self.inference is not None:
            return torch.ops.mkldnn._linear_pointwise(x, *self.inference, "none", [], "")
        if self.narrow is None:
            return F.linear(x, self.weight, self.bias)
        return _NarrowLinear.apply(x, self.weight, self.bias, *self.narrow)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


@dataclass(frozen=True)
class _MicroBatch:
    """Where the sequences of a flat run of T tokens begin, end and are read."""

    cu_seqlens: Tensor  # (N + 1,) int32
    one_each: Tensor  # (N + 1,) int32: 0, 1, ..., N
    first: Tensor  # (N,) int64


class _PostNorm:
    """A PostNormLayer with its weights cast for one step."""

    def __init__(self, layer: PostNormLayer, dtype: torch.dtype, num_tokens: int, *, last: bool) -> None:
        self.layer, self.last = layer, last
        if last:  # queries of first tokens only
            self.query = _Linear([layer.query], dtype, 0)
            self.key_value = _Linear([layer.key, layer.value], dtype, num_tokens)
        else:
            self.query_key_value = _Linear([layer.query, layer.key, layer.value], dtype, num_tokens)
        self.attention_out = _Linear([layer.attention_out], dtype, 0 if last else num_tokens)
        self.up = _Linear([layer.up], dtype, 0 if last else num_tokens)
        self.down = _Linear([layer.down], dtype, 0 if last else num_tokens)

    def __call__(self, wide: Tensor, x: Tensor, batch: _MicroBatch) -> tuple[Tensor, Tensor]:
        layer, heads = self.layer, self.layer.num_heads
        cu_queries = batch.cu_seqlens
        if self.last:
            key, value = self.key_value(x).view(x.shape[0], 2, heads, -1).unbind(1)
            wide, x = wide[batch.first], x[batch.first]
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
            **_dropout(layer.attention_dropout),
        )
        projected = self.attention_out(attended.flatten(1))
        wide, x = _add_norm(projected, wide, layer.attention_norm, layer.attention_out_dropout)
        widened = self.down(layer.activation(self.up(x)))
        return _add_norm(widened, wide, layer.output_norm, layer.down_dropout)


def _dropout(module: nn.Dropout | None) -> dict[str, Any]:
    """Options of an op with a dropout of its own; its seed is drawn from torch's generator of the host."""
    if module is None or not module.training or module.p == 0:
        return {}
    return {"dropout_p": module.p, "seed": int(torch.randint(2**62, ()))}


def _add_norm(x: Tensor, wide: Tensor, norm: nn.LayerNorm, dropout: nn.Dropout | None) -> tuple[Tensor, Tensor]:
    """norm(wide + dropout(x)) in wide's dtype and in x's."""
    weight, bias = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
    return residual_norm(x, wide, weight, bias, eps=norm.eps, **_dropout(dropout))


class PackedStep:
    """A model's scores of pairs, micro-batch by micro-batch, with what these share made once.

    Weights are cast to the compute dtype once, and the rows of the word embeddings that any pair needs are gathered
    once, so that their gradient is scattered once a step instead of once a micro-batch. The graph of the step hangs
    on both: make a new one after every change of the weights.

    Args:
        architecture: of the model.
        tokens: all pairs of the step.
        dtype: of products and attention: fp32 or bf16. Sums of the residual stream, norms and scores are fp32.
        gradient_checkpointing: compute the inside of every layer again in backward.
    """

    padded = False

    def __init__(
        self,
        architecture: Architecture,
        tokens: TokenizedPairs,
        *,
        dtype: torch.dtype,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.architecture, self.tokens, self.dtype = architecture, tokens, dtype
        self.gradient_checkpointing = gradient_checkpointing and torch.is_grad_enabled()
        # A caller's autocast would narrow the score head; what is to be narrow is cast here.
        self.region = torch.autocast(architecture.word_embeddings.weight.device.type, enabled=False)
        *body, last = architecture.layers
        size = len(tokens.input_ids)
        self.layers = [_PostNorm(layer, dtype, size, last=False) for layer in body]
        self.layers.append(_PostNorm(last, dtype, size, last=True))
        weight = architecture.word_embeddings.weight
        self._rows, self._rows_of_tokens = weight, tokens.input_ids
        if torch.is_grad_enabled() and weight.requires_grad:
            used, self._rows_of_tokens = np.unique(tokens.input_ids, return_inverse=True)
            padding = architecture.word_embeddings.padding_idx
            self._rows = F.embedding(torch.from_numpy(used).to(weight.device), weight, padding)

    def __call__(self, indices: np.ndarray) -> Tensor:
        """(M,) fp32 scores of the pairs at the (M,) indices, in their order."""
        flat, starts = self.tokens.flat_index(indices)
        device = self._rows.device
        types = self.tokens.token_type_ids
        type_ids = np.zeros(len(flat), np.int64) if types is None else types[flat].astype(np.int64)
        embedded = self.architecture.embed(
            F.embedding(torch.from_numpy(self._rows_of_tokens[flat]).to(device), self._rows)[None],
            torch.from_numpy(type_ids)[None].to(device),
            torch.from_numpy(self._positions(flat, starts))[None].to(device),
        )
        batch = _MicroBatch(
            torch.from_numpy(starts.astype(np.int32)).to(device),
            torch.arange(len(indices) + 1, dtype=torch.int32, device=device),
            torch.from_numpy(starts[:-1]).to(device),
        )
        wide = embedded[0].to(torch.promote_types(self.dtype, torch.float32))
        x = wide.to(self.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing:
                wide, x = checkpoint(layer, wide, x, batch, use_reentrant=False)
            else:
                wide, x = layer(wide, x, batch)
        return self.architecture.head(wide.to(self._rows.dtype)).to(wide.dtype)

    def _positions(self, flat: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """(T,) int64 position of every token, counted as the architecture counts."""
        first = np.repeat(starts[:-1], np.diff(starts))
        pad = self.architecture.pad_position
        if pad is None:
            return np.arange(len(flat)) - first
        # A text may spell the padding token: it is not counted, and has a position of its own.
        counts = self.tokens.input_ids[flat] != pad
        before = np.concatenate([[0], np.cumsum(counts)])
        return np.where(counts, before[1:] - before[first] + pad, pad)

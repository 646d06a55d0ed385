"""Gradients of a post-norm layer's vectors, of norms and biases, beside those of the rows they are
sums of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rerank_fast.model.packed.linear import bias_gradient
from rerank_fast.ops import relative_attention, residual_norm, varlen_attention
from rerank_fast.ops.relative_positions import RelativePositions

if TYPE_CHECKING:
    from rerank_fast.model.packed.post_norm_step import PostNormStep


class VectorGradients(Protocol):
    """Each method gives the gradients of rows; all() those of the vectors before them, in the order
    of the calls.

    That is first the later norm, weight and bias, and the bias of the product that it adds; then
    the bias before the GELU; the earlier norm; the biases of queries, keys and values.
    """

    def norm(self, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]: ...

    def gelu(self, hidden: Tensor, grad: Tensor) -> Tensor: ...

    def attention(self, *tensors_and_options: Any) -> None: ...

    def relative_attention(
        self, *tensors: Any, relative: RelativePositions, options: tuple[Any, ...]
    ) -> list[Tensor | None]:
        """Leaves beside them the gradients of the relative positions' keys, queries and bias."""

    def all(self) -> Sequence[Tensor]: ...


def vector_gradients(
    step: PostNormStep,
    wide: Tensor,
    d_projected: list[Tensor],
    norm_backend: str,
    attention_backend: str,
) -> VectorGradients:
    """What serves the backends: their kernels leave sums on a GPU, elsewhere PyTorch sums.

    Args:
        step: the layer's.
        wide: (T, H) rows of the norms.
        d_projected: results of the products before attention: their gradients are written there.
        norm_backend: of residual_norm.
        attention_backend: of varlen_attention.
    """
    if norm_backend == attention_backend == "triton":
        return _SumsOfKernels(step, wide, d_projected)
    return _SumsOfRows(step, wide, d_projected)


class _SumsOfRows:
    def __init__(self, step: PostNormStep, wide: Tensor, d_projected: list[Tensor]) -> None:
        self._step, self._dtype, self._d_projected = step, wide.dtype, d_projected
        self._found: list[Tensor] = []

    def norm(self, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dx, d_residual, *vectors = residual_norm.unchecked_backward(x, residual, *rest)
        self._found += [*vectors, bias_gradient(dx, self._dtype)]
        return dx, d_residual

    def gelu(self, hidden: Tensor, grad: Tensor) -> Tensor:
        result = torch.ops.aten.gelu_backward(grad, hidden)
        self._found.append(bias_gradient(result, self._dtype))
        return result

    def attention(self, *arguments: Any) -> None:
        varlen_attention.unchecked_backward(*arguments, into=self._step.heads_of(self._d_projected))
        self._add_biases()

    def relative_attention(
        self, *tensors: Any, relative: RelativePositions, options: tuple[Any, ...]
    ) -> list[Tensor | None]:
        *places, scale, _left, _right, dropout_p, seed, backend = options
        more = *places, relative, scale, dropout_p, seed, backend
        into = self._step.heads_of(self._d_projected)
        tables = relative_attention.unchecked_backward(*tensors, *more, into=into)
        self._add_biases()
        return tables

    def _add_biases(self) -> None:
        for one in self._d_projected:
            self._found += bias_gradient(one, self._dtype).split(self._step.width)

    def all(self) -> Sequence[Tensor]:
        return self._found


@functools.cache
def _kernels() -> SimpleNamespace:
    """Their functions: an import in each would take a tenth of the host's time of a layer."""
    from rerank_fast.ops.triton.column_sums import column_sums
    from rerank_fast.ops.triton.gelu import gelu_grad
    from rerank_fast.ops.triton.residual_norm import programs, residual_norm_grads
    from rerank_fast.ops.triton.varlen_attention_backward import attention_grads, sums_for

    return SimpleNamespace(
        column_sums=column_sums,
        gelu_grad=gelu_grad,
        programs=programs,
        residual_norm_grads=residual_norm_grads,
        attention_grads=attention_grads,
        sums_for=sums_for,
    )


class _SumsOfKernels:
    """A kernel leaves the sums of some rows in a row of a matrix; one launch at the end adds these
    up.
    """

    def __init__(self, step: PostNormStep, wide: Tensor, d_projected: list[Tensor]) -> None:
        self._step, self._d_projected, self._kernels = step, d_projected, _kernels()
        width, inner = step.width, step.inner_width
        self._sizes = [width, width, width, inner, *[width] * 6]
        self._sums = wide.new_empty(self._kernels.programs(wide.shape[0]), 6 * width + inner)
        # Of the later norm, the GELU and the earlier norm.
        self._parts = iter(self._sums.split_with_sizes([3 * width, inner, 3 * width], 1))

    def norm(self, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *tensors, _eps, dropout_p, seed, _backend = rest
        sums = next(self._parts)
        return self._kernels.residual_norm_grads(x, residual, *tensors, sums, dropout_p, seed)

    def gelu(self, hidden: Tensor, grad: Tensor) -> Tensor:
        return self._kernels.gelu_grad(hidden, grad, next(self._parts))

    def attention(self, q: Tensor, k: Tensor, *arguments: Any) -> None:
        *tensors, scale, left, right, dropout_p, seed, _backend = arguments
        self._attention_sums = self._kernels.sums_for(q, k, tensors[4].shape[0] - 1)
        outputs = *self._step.heads_of(self._d_projected), *self._attention_sums
        options = scale, left, right, dropout_p, seed
        self._kernels.attention_grads(q, k, *tensors, *outputs, *options)

    def relative_attention(
        self, *tensors: Any, relative: RelativePositions, options: tuple[Any, ...]
    ) -> list[Tensor | None]:
        raise NotImplementedError("layers with relative positions are composed on a GPU")

    def all(self) -> Sequence[Tensor]:
        sums = self._kernels.column_sums(self._sums, *self._attention_sums)
        return sums.split_with_sizes(self._sizes)

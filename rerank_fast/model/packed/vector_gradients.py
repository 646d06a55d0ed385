"""Gradients of a post-norm layer's vectors, of norms and biases, beside those of the rows they are
sums of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from rerank_fast.ops import relative_attention, residual_norm, varlen_attention
from rerank_fast.ops.relative_positions import RelativePositions

if TYPE_CHECKING:
    from rerank_fast.model.packed.linear import StepLinear
    from rerank_fast.model.packed.post_norm_step import PostNormStep


class VectorGradients(Protocol):
    """Each method gives the gradients of rows; all(), when those of the products before attention
    are done, the vectors'.

    That is first the later norm, weight and bias, and the bias of the product that it adds, where
    there is one; then those of the earlier norm; the biases before the activation; the biases of
    queries, keys and values.
    """

    def norm(
        self, linear: StepLinear, x: Tensor, residual: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        """linear is the product that it adds."""

    def activation(self, hidden: Tensor, grad: Tensor) -> Tensor: ...

    def attention(self, *tensors_and_options: Any) -> None: ...

    def relative_attention(
        self, *tensors: Any, relative: RelativePositions, options: tuple[Any, ...]
    ) -> list[Tensor | None]:
        """Leaves beside them the gradients of the relative positions' keys, queries and bias."""

    def all(self) -> Sequence[Tensor | None]: ...


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
    return _SumsOfRows(step, d_projected)


class _SumsOfRows:
    def __init__(self, step: PostNormStep, d_projected: list[Tensor]) -> None:
        self._step, self._d_projected = step, d_projected
        self._norms: list[Tensor | None] = []
        self._biases: Sequence[Tensor | None] = ()

    def norm(
        self, linear: StepLinear, x: Tensor, residual: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        dx, d_residual, *vectors = residual_norm.unchecked_backward(x, residual, *rest)
        self._norms += [*vectors, *linear.bias_gradients(dx)]
        return dx, d_residual

    def activation(self, hidden: Tensor, grad: Tensor) -> Tensor:
        result = self._step.activation_grad(hidden, grad)
        self._biases = self._step.up.bias_gradients(result)
        return result

    def attention(self, *arguments: Any) -> None:
        varlen_attention.unchecked_backward(*arguments, into=self._step.heads_of(self._d_projected))

    def relative_attention(
        self, *tensors: Any, relative: RelativePositions, options: tuple[Any, ...]
    ) -> list[Tensor | None]:
        *places, scale, _left, _right, dropout_p, seed, backend = options
        more = *places, relative, scale, dropout_p, seed, backend
        into = self._step.heads_of(self._d_projected)
        return relative_attention.unchecked_backward(*tensors, *more, into=into)

    def all(self) -> Sequence[Tensor | None]:
        return [*self._norms, *self._biases, *_projected_biases(self._step, self._d_projected)]


def _projected_biases(step: PostNormStep, d_projected: list[Tensor]) -> list[Tensor | None]:
    """Of queries, keys and values, summed by PyTorch."""
    each = zip(step.projections, d_projected, strict=True)
    return [one for linear, grad in each for one in linear.bias_gradients(grad)]


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
    up. Gates leave none, nor does attention whose queries and keys are still to be rotated back.
    """

    def __init__(self, step: PostNormStep, wide: Tensor, d_projected: list[Tensor]) -> None:
        self._step, self._d_projected, self._kernels = step, d_projected, _kernels()
        width, layer = step.width, step.layer
        widths = [width * (2 + len(one.biases)) for one in (step.down, step.attention_out)]
        inner = step.inner_width if layer.gate is None and step.up.biases else 0
        rows = self._kernels.programs(wide.shape[0])
        self._sums = wide.new_empty(rows, sum(widths) + inner)
        *norms, self._inner = self._sums.split_with_sizes([*widths, inner], 1)
        self._norms = iter(norms)
        self._sizes = [*[width] * (sum(widths) // width), *([inner] if inner else [])]
        self._sums_attention = (
            layer.rotary is None and inner > 0 and all(one.biases for one in step.projections)
        )
        self._of_attention: tuple[Tensor | None, Tensor | None] = (None, None)
        self._biases: Sequence[Tensor | None] = ()  # where PyTorch sums

    def norm(
        self, linear: StepLinear, x: Tensor, residual: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        *tensors, _eps, dropout_p, seed, _backend = rest
        sums = next(self._norms)
        return self._kernels.residual_norm_grads(x, residual, *tensors, sums, dropout_p, seed)

    def activation(self, hidden: Tensor, grad: Tensor) -> Tensor:
        if self._inner.shape[1] > 0:
            return self._kernels.gelu_grad(hidden, grad, self._inner)
        result = self._step.activation_grad(hidden, grad)
        self._biases = self._step.up.bias_gradients(result)
        return result

    def attention(self, q: Tensor, k: Tensor, *arguments: Any) -> None:
        *tensors, scale, left, right, dropout_p, seed, _backend = arguments
        if self._sums_attention:
            self._of_attention = self._kernels.sums_for(q, k, tensors[4].shape[0] - 1)
            self._sizes += [self._step.width] * 3
        outputs = *self._step.heads_of(self._d_projected), *self._of_attention
        options = scale, left, right, dropout_p, seed
        self._kernels.attention_grads(q, k, *tensors, *outputs, *options)

    def relative_attention(
        self, *tensors: Any, relative: RelativePositions, options: tuple[Any, ...]
    ) -> list[Tensor | None]:
        raise NotImplementedError("layers with relative positions are composed on a GPU")

    def all(self) -> Sequence[Tensor | None]:
        sums = self._kernels.column_sums(self._sums, *self._of_attention)
        found = [*sums.split_with_sizes(self._sizes), *self._biases]
        if self._sums_attention:
            return found
        return [*found, *_projected_biases(self._step, self._d_projected)]

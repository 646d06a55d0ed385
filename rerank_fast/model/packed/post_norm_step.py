"""One layer that norms after each sum, as BERT does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.architectures import PostNormLayer
from rerank_fast.model.packed.gradients import parameters_through
from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.packed.layers import (
    LayerBatch,
    MicroBatch,
    Rows,
    dropped,
    layer_batch_of,
    rotated,
    share_of,
)
from rerank_fast.model.packed.linear import NarrowCopies, StepLinear, joins_product
from rerank_fast.model.packed.norm import add_norm, ready_norm
from rerank_fast.model.packed.post_norm import TrainedPostNorm
from rerank_fast.model.packed.pre_norm_parts import gate_of
from rerank_fast.model.packed.relative import RelativeStep
from rerank_fast.ops.int8_linear import Int8Rows
from rerank_fast.ops.layer_kernels import LayerKernels, kernels_for
from rerank_fast.ops.residual_norm import backend_for
from rerank_fast.ops.varlen_attention import own_backend_for, varlen_attention


class PostNormStep:
    """A PostNormLayer with its weights made ready for one step; one_token computes only the token
    that is read.

    trains: rotary positions and gates through kernels, and with gradients all of it as one function
    of autograd, where no module of the layer must be called and its parts are known.
    adds_gradients: see Preparer.
    """

    def __init__(
        self,
        layer: PostNormLayer,
        dtype: torch.dtype,
        num_tokens: int,
        *,
        one_token: bool,
        copies: NarrowCopies | None = None,
        trains: bool = False,
        adds_gradients: bool = False,
    ) -> None:
        # Of the last layer most is computed for one token of each pair.
        few, infers = 0 if one_token else num_tokens, not torch.is_grad_enabled()
        self.layer, self.one_token, self.adds_gradients = layer, one_token, adds_gradients
        if one_token:
            keys = StepLinear([layer.key, layer.value], dtype, num_tokens, copies=copies)
            self.projections = [StepLinear([layer.query], dtype, 0, copies=copies), keys]
        else:
            self.projections = [
                StepLinear([layer.query, layer.key, layer.value], dtype, num_tokens, copies=copies)
            ]
        self.attention_out = StepLinear([layer.attention_out], dtype, few, copies=copies)
        if layer.gate is None:
            self.up = StepLinear([layer.up], dtype, few, layer.activation, copies)
        else:
            gate_up = [layer.gate, layer.up]
            self.up = StepLinear(gate_up, dtype, few, layer.activation, copies, gated=True)
        self.down = StepLinear([layer.down], dtype, few, copies=copies)
        linears = [self.down, self.up, self.attention_out, *self.projections]
        self.adapter: tuple[StepLinear, StepLinear] | None = None
        if layer.adapter is not None:
            narrow, act = layer.adapter.down, layer.adapter.activation
            self.adapter = (
                StepLinear([narrow], dtype, few, act, copies),
                StepLinear([layer.adapter.up], dtype, few, copies=copies),
            )
        self.relative: RelativeStep | None = None
        if layer.relative is not None:
            terms, on_cpu = layer.relative, layer.relative.embeddings.weight.device.type == "cpu"
            on_host = on_cpu and (trains or infers)
            self.relative = RelativeStep(terms, layer.num_heads, dtype, copies, on_host=on_host)
        further = [] if self.relative is None else self.relative.linears
        self.linears = [*linears, *(self.adapter or ()), *further]
        kernels = _kernels_of(layer, dtype) if trains else None
        own = all(one.has_weight for one in linears) and layer.adapter is None
        self.trains = trains and not infers and own and _is_known(layer, kernels)
        if self.trains and self.relative is not None:  # Triton's kernels write no gradients into
            like = self.down.weights[0].new_empty(0, layer.num_heads, 1, dtype=dtype)
            self.trains = own_backend_for(like) != "triton"
        # They write to where a product lies: it must be this step's, and no graph's.
        writes = self.trains or (infers and all(one.modules is None for one in linears))
        self.kernels = kernels if writes else None
        self.gate = None if layer.gate is None else gate_of(layer.activation)
        self.attention_norm = ready_norm(layer.attention_norm, dtype, copies, trains=self.trains)
        self.output_norm = ready_norm(layer.output_norm, dtype, copies, trains=self.trains)
        self._backends: tuple[str, str] | None = None  # of attention and norms
        self.trained: list[Tensor] = []  # as TrainedPostNorm takes them
        if self.trains:
            self.width, self.inner_width = self.down.weights[0].shape
            self.weights = [one.ready[0] for one in linears]
            self.trained = [weight for one in linears for weight in one.weights]
            for norm, first in (
                (layer.output_norm, self.down),
                (layer.attention_norm, self.attention_out),
            ):
                self.trained += [norm.weight, norm.bias, *first.biases]
            self.trained += [b for one in (self.up, *self.projections) for b in one.biases]

    @property
    def calls_no_module(self) -> bool:
        """Whether seeds are all that is drawn in it."""
        return self.trains and self.layer.mlp_dropout is None

    def dropouts(self) -> list[float]:
        """The shares that are dropped, in the order of prepare's seeds."""
        layer, relative = self.layer, self.relative
        down = share_of(layer.down_dropout)
        return [
            share_of(layer.attention_dropout, layer.attention_dropout_p),
            share_of(layer.attention_out_dropout),
            *([down] if layer.adapter is None else [down, down]),
            0.0 if relative is None else relative.dropout_p,
        ]

    def prepare(self, batch: MicroBatch, seeds: list[int]) -> LayerBatch:
        layer, relative = self.layer, self.relative
        *seeds, last = seeds
        prepared = layer_batch_of(batch, seeds, one_token=self.one_token)
        if layer.rotary is not None:
            prepared = replace(prepared, rotary=batch.rotary[layer.rotary])
        if relative is None:
            return prepared
        # Where the last token is read, it stands beside the last key without being told to.
        of_first = self.one_token and not batch.reads_last
        first_of = len(batch.lengths) if of_first else None
        return replace(prepared, relative=relative.prepare(batch.longest, first_of, last))

    def __call__(self, wide: Tensor, x: Rows, batch: LayerBatch) -> tuple[Tensor, Rows]:
        if self.trains:
            # By the dtype: checkpointing's second run has two tensors for one.
            narrow_rows = None if x.dtype == wide.dtype else x
            through = parameters_through(self, wide)
            tables: tuple[Tensor | None, ...] = (None, None, None)
            if self.relative is not None and batch.relative is not None:
                found = self.relative(batch.relative)
                tables = found.keys, found.queries, found.bias
            layer_of = (self, batch, *tables)
            result, narrow = TrainedPostNorm.apply(wide, narrow_rows, *layer_of, *through)
            return result, result if narrow is None else narrow
        queries_of = x
        if batch.read is not None:
            # Not wide[...], whose gradient is sorted on a GPU.
            wide = wide.index_select(0, batch.read)
            queries_of = x[batch.read] if isinstance(x, Int8Rows) else x.index_select(0, batch.read)
        projected = [linear(rows) for linear, rows in self.projections_of(queries_of, x)]
        self.rotate(projected, batch)
        query, key, value = self.heads_of(projected)
        layer, relative = self.layer, None
        if batch.rotary is not None and self.kernels is None:
            cos, sin = batch.rotary
            key = rotated(key, cos, sin)
            if batch.read is not None:
                cos, sin = cos.index_select(0, batch.read), sin.index_select(0, batch.read)
            query = rotated(query, cos, sin)
        if self.relative is not None and batch.relative is not None:
            relative = self.relative(batch.relative)
        attended = varlen_attention(
            query,
            key,
            value,
            batch.cu_queries,
            batch.cu_keys,
            scale=layer.scale,
            dropout_p=share_of(layer.attention_dropout, layer.attention_dropout_p),
            seed=batch.seeds[0],
            rows=batch.rows,
            relative=relative,
            max_seqlens=batch.max_seqlens,
        )
        attention = (
            self.attention_out,
            attended.flatten(1),
            self.attention_norm,
            layer.attention_out_dropout,
        )
        wide, x = add_norm(wide, *attention, batch.seeds[1], batch.rows)
        if layer.gate is None:
            widened = self.up.before(self.down, x)
        else:
            widened = dropped(self._gated(x), layer.mlp_dropout)
        last = self.down
        if layer.adapter is not None and self.adapter is not None:
            before = (layer.adapter.norm, layer.down_dropout, batch.seeds[3], batch.rows)
            wide, x = add_norm(wide, last, widened, *before)
            down, last = self.adapter
            widened = down.before(last, x)
        return add_norm(
            wide,
            last,
            widened,
            self.output_norm,
            layer.down_dropout,
            batch.seeds[2],
            batch.rows,
        )

    def projections_of(self, queries_of: Rows, keys_of: Rows) -> list[tuple[StepLinear, Any]]:
        """The products before attention, each with the rows that it reads."""
        rows = (queries_of, keys_of)[-len(self.projections) :]
        return list(zip(self.projections, rows, strict=True))

    def heads_of(self, projected: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(T, heads, head size) queries, keys and values in the results of these products."""
        heads = self.layer.num_heads
        if len(projected) == 1:
            query, key, value = projected[0].view(projected[0].shape[0], 3, heads, -1).unbind(1)
        else:
            query = projected[0].view(projected[0].shape[0], heads, -1)
            key, value = projected[1].view(projected[1].shape[0], 2, heads, -1).unbind(1)
        return query, key, value

    def rotate(self, projected: list[Tensor], batch: LayerBatch) -> None:
        """Queries and keys in the results of these products to their positions, where kernels do
        it.
        """
        if self.kernels is not None:
            for x, cos, sin in self._rotated(projected, batch):
                self.kernels.rotary(x, x, cos, sin, None, x.shape[1], 0.0)

    def rotate_back(self, gradients: list[Tensor], batch: LayerBatch) -> None:
        """The gradients of what rotate was given, in place of those of what it left."""
        if self.kernels is not None:
            for grad, cos, sin in self._rotated(gradients, batch):
                self.kernels.rotary_grad(grad, None, cos, sin, None, grad.shape[1], 0.0)

    def _rotated(
        self, projected: list[Tensor], batch: LayerBatch
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(T, heads, head size) what has positions, each with its cosines and sines."""
        if batch.rotary is None:
            return []
        heads, (cos, sin) = self.layer.num_heads, batch.rotary
        *of_queries, last = projected
        if not of_queries:
            return [(last.view(len(last), 3 * heads, -1)[:, : 2 * heads], cos, sin)]
        (query,) = of_queries
        assert batch.read is not None
        places = cos.index_select(0, batch.read), sin.index_select(0, batch.read)
        keys = last.view(len(last), 2 * heads, -1)[:, :heads]
        return [(query.view(len(query), heads, -1), *places), (keys, cos, sin)]

    def activated(self, hidden: Tensor) -> Tensor:
        """The activation of up's product, where the layer is one function."""
        if self.gate is None or self.kernels is None:
            return F.gelu(hidden)
        return self.kernels.gated(hidden, self.gate)

    def activation_grad(self, hidden: Tensor, grad: Tensor) -> Tensor:
        """The gradient of up's product from that of its activation."""
        if self.gate is None or self.kernels is None:
            return torch.ops.aten.gelu_backward(grad, hidden)
        return self.kernels.gated_grad(hidden, grad, self.gate)

    def _gated(self, x: Rows) -> Tensor:
        """What the feed-forward's last product reads, composed."""
        if self.kernels is None or self.gate is None or self.up.activation is None:
            return self.up(x)
        return self.kernels.gated(self.up.product(x), self.gate)

    def options(
        self, batch: LayerBatch, query: Tensor, rows: Tensor, wide: Tensor
    ) -> tuple[tuple[Any, ...], ...]:
        """What the unchecked ops take behind their tensors: of attention and of both norms."""
        if self._backends is None:  # the same for all that the step computes
            self._backends = own_backend_for(query), backend_for(rows, wide)
        attention_backend, backend = self._backends
        *shares, _ = self.dropouts()
        drawn = list(zip(shares, batch.seeds, strict=True))
        numbers = [batch.rows if p > 0 else None for p, _ in drawn]
        places = batch.cu_queries, batch.cu_keys, numbers[0]
        return (
            (*places, self.layer.scale, -1, -1, *drawn[0], attention_backend),
            (numbers[1], self.attention_norm.eps, *drawn[1], backend),
            (numbers[2], self.output_norm.eps, *drawn[2], backend),
        )


def _kernels_of(layer: PostNormLayer, dtype: torch.dtype) -> LayerKernels | None:
    """Those that its rotary positions and its gate run through; None where none are there, and
    none needed.
    """
    if layer.rotary is None and layer.gate is None:
        return None
    return kernels_for(layer.output_norm.weight.device, dtype)


def _is_known(layer: PostNormLayer, kernels: LayerKernels | None) -> bool:
    """Whether each part between the products has its gradient here."""
    dropout = layer.mlp_dropout
    if dropout is not None and (type(dropout) is not nn.Dropout or must_be_called(dropout)):
        return False
    if layer.gate is None:
        return joins_product(layer.activation) and (layer.rotary is None or kernels is not None)
    return gate_of(layer.activation) is not None and kernels is not None

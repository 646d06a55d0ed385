"""The layers of an architecture ready to run, and the residual stream behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rerank_fast.model.packed.architectures import Architecture, PostNormLayer
from rerank_fast.model.packed.embeddings import FusedEmbeddings
from rerank_fast.model.packed.layers import Rows, dropped
from rerank_fast.model.packed.linear import NarrowCopies
from rerank_fast.model.packed.norm import added, norm
from rerank_fast.model.packed.post_norm_step import PostNormStep
from rerank_fast.model.packed.pre_norm_step import PreNormStep
from rerank_fast.ops.layer_kernels import triton_serves

Step: TypeAlias = PostNormStep | PreNormStep


class ReadyLayers:
    """The layers of an architecture with copies of their weights, for one step or for one after the
    other.

    Args:
        architecture: of the model.
        dtype: of products and attention.
        num_tokens: about how many a step has.
        compiles: whether torch.compile traces the layers.
        adds_gradients: see Preparer.
        lasts: without gradients too they serve one call after the other, and follow the weights.

    Attributes:
        calls_no_module: in training, between the embeddings and the head: seeds are all that is
            drawn there.
        embeddings: as one kernel, where there is one.
    """

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        num_tokens: int,
        *,
        compiles: bool,
        adds_gradients: bool = False,
        lasts: bool = False,
    ) -> None:
        grads, on_cpu = (
            torch.is_grad_enabled(),
            architecture.word_embeddings.weight.device.type == "cpu",
        )
        self._dtype = dtype
        self.layers: list[Step] = []
        self.decoder_layers: list[PreNormStep] = []
        # Without gradients a CPU lays weights out anew, one by one.
        self._copies = NarrowCopies() if grads or lasts or not on_cpu else None
        options: dict[str, Any] = {"copies": self._copies, "adds_gradients": adds_gradients}
        decoder = architecture.decoder
        reads_one = architecture.pool is None and decoder is None
        trains, added_norm = not compiles, None
        for depth, layer in enumerate(architecture.layers, start=1):
            one_token = reads_one and depth == len(architecture.layers)
            more: dict[str, Any] = {**options, "one_token": one_token, "trains": trains}
            if isinstance(layer, PostNormLayer):
                self.layers.append(PostNormStep(layer, dtype, num_tokens, **more))
            else:
                self.layers.append(
                    PreNormStep(layer, dtype, num_tokens, added_norm=added_norm, **more)
                )
                added_norm = layer.post_mlp_norm
        for decoders in () if decoder is None else decoder.layers:
            self.decoder_layers.append(
                PreNormStep(decoders, dtype, num_tokens, one_token=False, **options)
            )
        self.calls_no_module = (
            architecture.final_dropout is None
            and decoder is None
            and all(isinstance(one, PostNormStep) and one.calls_no_module for one in self.layers)
        )
        self.embeddings = None
        if triton_serves(architecture.word_embeddings.weight.device, dtype):
            self.embeddings = FusedEmbeddings.find(architecture.embeddings)

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether the modules have the weights still that they had, and products the dtype."""
        return dtype == self._dtype and all(
            one.is_current()
            for layer in (*self.layers, *self.decoder_layers)
            for one in layer.linears
        )

    def fill(self) -> None:
        """Copy the weights as they are now."""
        if self._copies is not None:
            self._copies.fill()


def summed(layers: Sequence[Step], wide: Tensor, x: Rows | None) -> Tensor:
    """The residual stream with what the last layer has left to be added."""
    last = layers[-1]
    if not isinstance(last, PreNormStep) or not isinstance(x, Tensor):
        return wide
    return wide + added(x, last.layer.post_mlp_norm)


def finished(architecture: Architecture, wide: Tensor) -> Tensor:
    """The encoder's result, from the stream behind all layers."""
    if architecture.final_norm is not None:
        wide = norm(wide, architecture.final_norm)
    return dropped(wide, architecture.final_dropout)

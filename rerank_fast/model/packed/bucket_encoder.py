"""An encoder whose shapes follow from a bucket of tokens alone, and which asks for no value: it can
be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from rerank_fast.model.packed.architectures import Architecture
from rerank_fast.model.packed.buckets import Bucket, BucketInputs, InputLayout
from rerank_fast.model.packed.embeddings import FusedEmbeddings, TokenPlaces, WordPlaces
from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.packed.layers import MicroBatch, prepare_layers, run_layer
from rerank_fast.model.packed.post_norm_step import PostNormStep
from rerank_fast.model.packed.pre_norm_step import PreNormStep
from rerank_fast.model.packed.ready_layers import Step, finished, summed
from rerank_fast.ops.layer_kernels import triton_serves


class BucketEncoder:
    """Rows of the tokens that are read, from inputs that are filled up to a bucket.

    Args:
        model: whose parts these are.
        architecture: of the model.
        layers: its steps; weights are copied by their owner.
        dtype: of products.
        seed: of all dropout; None where nothing is dropped out and no gradient asked for.

    Raises:
        ValueError: the model has a part that can't be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        layers: Sequence[Step],
        dtype: torch.dtype,
        *,
        seed: int | None,
    ) -> None:
        self._modules = list(model.modules())
        if part := _uncapturable(self._modules, architecture, layers):
            refuse(part)
        if not triton_serves(architecture.word_embeddings.weight.device, dtype):
            refuse("what Triton does not run")
        self.parameters = list(model.parameters())
        self._owned: list[tuple[dict[str, Any], str]] = [
            (owner, name)
            for module in self._modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._architecture, self._layers = architecture, layers
        self._embeddings = FusedEmbeddings.find(architecture.embeddings)
        self.layout = InputLayout(architecture, self._embeddings, trains=seed is not None)
        self._is_post_norm = isinstance(layers[0], PostNormStep)
        self._dtype, self._seed = dtype, seed
        self._words = architecture.word_embeddings

    def tensors(self) -> list[Any]:
        """Where all lie that is read, and which are trained: what is captured reads them there."""
        tensors = [owner[name] for owner, name in self._owned]
        return [*map(Tensor.data_ptr, tensors), *(one.requires_grad for one in tensors)]

    def modes(self) -> tuple[bool, ...]:
        """Which modules are in training mode."""
        return tuple(one.training for one in self._modules)

    def __call__(self, bucket: Bucket, values: Tensor) -> Tensor:
        """(bucket's sequences, H) rows, from what was uploaded."""
        architecture, given = self._architecture, self.layout.parts(bucket, values)
        ends, reads_last = given.ends, architecture.reads == "last"
        fused, places = self._embeddings, given.places
        x: Any = None  # before the first pre-norm layer nothing is left to be added
        if isinstance(places, WordPlaces):
            wide = self._embed(places.rows(self._words.weight), given)
            x = wide.to(self._dtype) if self._is_post_norm else None
        with nullcontext() if self._seed is None else _drawing_from(self._seed):
            if isinstance(places, TokenPlaces) and fused is not None:
                table = self._words.weight
                wide, narrow = fused(table, places, given.token_rows, self._dtype)
                x = narrow if self._is_post_norm else None
            batch = MicroBatch(
                ends,
                given.one_each,
                (ends[1:] - 1 if reads_last else ends[:-1]).long(),
                {} if architecture.rotary is None else architecture.rotary(wide, given.positions),
                np.full(bucket.sequences, bucket.tokens),
                given.token_rows,
                given.sequence_rows,
                reads_last=reads_last,
                captured=True,
            )
            prepared = prepare_layers(self._layers, batch)
        for layer, layer_batch in zip(self._layers, prepared, strict=True):
            wide, x = run_layer(layer, wide, x, layer_batch)
        wide = finished(architecture, summed(self._layers, wide, x))
        if architecture.pool is not None and given.owner is not None:
            wide = architecture.pool(wide, ends, given.owner.long())
        return wide.to(self._words.weight.dtype)

    def _embed(self, words: Tensor, given: BucketInputs) -> Tensor:
        """The first layer's wide rows, from (T, H) of the words."""
        embedded = self._architecture.embed(words[None], given.types, given.positions).squeeze(0)
        return embedded.to(torch.promote_types(self._dtype, torch.float32))


def _uncapturable(
    modules: Sequence[nn.Module], architecture: Architecture, layers: Sequence[Step]
) -> str:
    """The first part that a graph can't have; empty where there is none."""
    if architecture.decoder is not None:
        return "an encoder-decoder"
    if any(one.relative is not None for one in layers):
        return "relative positions"
    if not all(linear.has_weight for one in layers for linear in one.linears):
        return "an adapter, a hook or int8 in a layer"
    if any(map(must_be_called, modules[1:])):  # nobody calls the whole model
        return "a hook of a module"
    if any(one._backward_hooks for one in modules[0].parameters()):
        return "a hook of a parameter"
    if _cuts_keys(layers[-1], architecture):
        return "a last layer with a window that is read at its first token"
    kinds = [getattr(module, "rope_type", "") for module in modules]
    names = [name for one in kinds for name in (one.values() if isinstance(one, dict) else [one])]
    if any(name in ("dynamic", "longrope") for name in names):
        return "rotary positions that follow from a batch's longest text"
    return ""


def _cuts_keys(last: Step, architecture: Architecture) -> bool:
    """Whether the last layer gathers the keys that first tokens may see, whose number no bucket
    says.
    """
    if not isinstance(last, PreNormStep) or not last.one_token or architecture.reads == "last":
        return False
    return last.layer.causal or last.layer.window is not None


def refuse(part: str) -> NoReturn:
    """Raises ValueError, by what a graph can't have."""
    raise ValueError(f"CUDA graphs must be off here: {part} can't be captured")


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Inside, the seeds of dropout that the host draws are the same in each call."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)

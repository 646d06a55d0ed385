"""A training step's encoder in buckets of tokens, each captured as CUDA graphs and replayed.

A step of a small model is bound by its launches: a replay is one. What is captured must not change
from step to step but for the values of its inputs, so that

- tokens and sequences are rounded up to a bucket, from which all shapes follow: sequences that no
  loss reads take the rest, and get no gradient;
- the whole table of words is read, whose number is no step's;
- dropout's seeds are the run's, and the numbers of rows in it begin at one that is drawn for each
  step: a counter, which the kernels hash with the seed;
- head, loss and optimizer, which depend on lists or on the host's numbers, stay outside.

Experimental: no GPU has run it.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rerank_fast.model.packed.architectures import Architecture
from rerank_fast.model.packed.buckets import Bucket, BucketInputs, InputLayout
from rerank_fast.model.packed.captures import Claim, CudaGraphs, Replayed
from rerank_fast.model.packed.embeddings import FusedEmbeddings, TokenPlaces, WordPlaces
from rerank_fast.model.packed.layers import MicroBatch, PostNormStep, run_layer
from rerank_fast.model.packed.linear import must_be_called
from rerank_fast.model.packed.pre_norm_step import PreNormStep
from rerank_fast.model.packed.ready_layers import Step, finished, summed
from rerank_fast.model.random_state import nothing_drawn, random_state

MOST_GRAPHS = 8  # each keeps the gradients of all weights


class EncoderGraphs:
    """Rows of the tokens that are read, by graphs of the buckets that come back; those that were
    not asked for longest make room.

    While the last graph of autograd is still to be gone back through, as of the micro-batch before,
    its activations lie in the memory of all captures: what comes meanwhile is computed without one,
    to the same numbers.

    Args:
        model: of which all parameters, buffers and modes are looked at before each replay: graphs
            of others are dropped.
        architecture: of the model.
        layers: its steps; weights are copied by their owner.
        dtype: of products.
        seed: of all dropout.

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
        seed: int,
    ) -> None:
        self._modules = list(model.modules())
        if part := _uncapturable(self._modules, architecture, layers):
            _refuse(part)
        self._parameters = list(model.parameters())
        self._owned: list[tuple[dict[str, Any], str]] = [
            (owner, name)
            for module in self._modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._architecture, self._layers = architecture, layers
        self._embeddings = FusedEmbeddings.find(architecture.embeddings)
        self._layout = InputLayout(architecture, self._embeddings)
        self._is_post_norm = isinstance(layers[0], PostNormStep)
        self._dtype, self._seed = dtype, seed
        self._words = architecture.word_embeddings
        self._captured: OrderedDict[Any, CudaGraphs] = OrderedDict()  # by bucket and modes
        self._taken: list[Any] = []  # what all that is captured reads
        self._pool: Any = None
        self._claim: weakref.ref[Claim] | None = None  # the last one

    def __call__(
        self, words: np.ndarray, positions: np.ndarray, types: np.ndarray, starts: np.ndarray
    ) -> Tensor:
        """(N, H) rows of the read tokens of N sequences.

        Args:
            words: (T,) ids.
            positions: (T,) of the tokens.
            types: (T,) of the tokens.
            starts: (N + 1,) where the sequences begin, and T.

        Raises:
            ValueError: something was drawn that each replay would have to draw anew.
        """
        num_sequences = len(starts) - 1
        bucket = Bucket.of(len(words), num_sequences)
        values = self._layout.upload(bucket, words, positions, types, starts)
        return self._read(bucket, values)[:num_sequences]

    def _read(self, bucket: Bucket, values: Tensor) -> Tensor:
        is_claimed = self._claim is not None and self._claim() is not None
        if is_claimed or not torch.is_grad_enabled():
            return self.encode(bucket, values)
        if (taken := self._tensors()) != self._taken:
            self._captured.clear()
            self._taken = taken
        key = bucket, tuple(one.training for one in self._modules)
        if key not in self._captured:
            weights = self._trained(bucket, values)
            if not weights:
                return self.encode(bucket, values)
            self._captured[key] = self._capture(bucket, values, weights)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        read = Replayed.apply(captured.weights[0], values, captured)
        read.grad_fn.claim = claim = Claim()
        self._claim = weakref.ref(claim)
        return read

    def _tensors(self) -> list[Any]:
        """Where all lie that a graph may read, and which are trained."""
        tensors = [owner[name] for owner, name in self._owned]
        return [*map(Tensor.data_ptr, tensors), *(one.requires_grad for one in tensors)]

    def _trained(self, bucket: Bucket, values: Tensor) -> list[Tensor]:
        """The weights that get a gradient, as one pass through the encoder finds them."""
        before = random_state(values.device)
        read = self.encode(bucket, values)
        if not nothing_drawn(before, random_state(values.device)):
            _refuse("dropout that is drawn by torch")
        if not read.requires_grad:
            return []
        weights = [one for one in self._parameters if one.requires_grad]
        found = torch.autograd.grad(read, weights, torch.zeros_like(read), allow_unused=True)
        return [one for one, grad in zip(weights, found, strict=True) if grad is not None]

    def _capture(self, bucket: Bucket, values: Tensor, weights: list[Tensor]) -> CudaGraphs:
        while len(self._captured) >= MOST_GRAPHS:
            self._captured.popitem(last=False)
        if self._pool is None and values.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()

        def encode(given: Tensor) -> Tensor:
            return self.encode(bucket, given)

        with torch.cuda.device_of(values):  # the stream that captures is the current device's
            return CudaGraphs(encode, values, weights, self._pool)

    def encode(self, bucket: Bucket, values: Tensor) -> Tensor:
        """(bucket's sequences, H) rows, from what was uploaded."""
        architecture, given = self._architecture, self._layout.parts(bucket, values)
        ends, reads_last = given.ends, architecture.reads == "last"
        fused, places = self._embeddings, given.places
        x: Any = None  # before the first pre-norm layer nothing is left to be added
        if isinstance(places, WordPlaces):
            wide = self._embed(places.rows(self._words.weight), given)
            x = wide.to(self._dtype) if self._is_post_norm else None
        with _drawing_from(self._seed):
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
            prepared = [layer.prepare(batch) for layer in self._layers]
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


def _refuse(part: str) -> None:
    raise ValueError(f"cuda_graphs must be off here: {part} can't be captured")


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Inside, the seeds of dropout that the host draws are the same in each call."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)

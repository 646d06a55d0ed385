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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.packed.architectures import Architecture
from rerank_fast.model.packed.embeddings import FusedEmbeddings, TokenPlaces
from rerank_fast.model.packed.layers import LayerBatch, MicroBatch, PostNormStep, prepare_layers
from rerank_fast.model.packed.linear import add_gradients
from rerank_fast.model.tokens.packing import upload
from rerank_fast.ops.differentiated_once import differentiated_once

MOST_GRAPHS = 8  # each keeps the gradients of all weights
_LEAST = 64, 8  # tokens and sequences of a bucket
_MOST_ROWS = 2**30  # where a step's numbers of rows begin: below 2**31 with any bucket's behind it


@dataclass(frozen=True)
class Bucket:
    """What all shapes follow from."""

    tokens: int
    sequences: int

    @staticmethod
    def of(num_tokens: int, num_sequences: int) -> Bucket:
        """The least one with a sequence to spare, which has a token.

        That is a sixteenth more at most, or 64 tokens and 8 sequences.
        """
        tokens, sequences = _LEAST
        sequences = _rounded(num_sequences + 1, sequences)
        return Bucket(_rounded(num_tokens + sequences - num_sequences, tokens), sequences)


def _rounded(count: int, least: int) -> int:
    grain = max(least, 1 << max(count.bit_length() - 5, 0))
    return -(-count // grain) * grain


class CudaGraphs:
    """One bucket's forward and backward pass as CUDA has captured them: replays take the buffers
    that were there.

    Args:
        encode: gives (N, H) rows for values; launches, and asks for no value.
        values: of the shape that replays have.
        weights: whose gradients are asked for.
        pool: of the memory that all graphs share, of which one runs at a time.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], values: Tensor, weights: list[Tensor], pool: Any
    ) -> None:
        self._values = values.clone()

        def back(read: Tensor, grad: Tensor) -> Sequence[Tensor | None]:
            return torch.autograd.grad(read, weights, grad, allow_unused=True)

        stream = torch.cuda.Stream(values.device)
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):  # kernels are compiled and libraries begin outside
            for _ in range(2):
                read = encode(self._values)
                back(read, torch.zeros_like(read))
        torch.cuda.current_stream(values.device).wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool):
            read = encode(self._values)
        self._grad = torch.zeros_like(read)
        with torch.cuda.graph(self._backward, pool=pool):
            self._gradients = back(read, self._grad)
        self._read = read.detach()

    def forward(self, values: Tensor) -> Tensor:
        """What encode gives for these values; it lasts until the next call."""
        self._values.copy_(values)
        self._forward.replay()
        return self._read

    def backward(self, grad: Tensor) -> Sequence[Tensor | None]:
        """The weights' gradients, of the last forward; they last until the next call."""
        self._grad.copy_(grad)
        self._backward.replay()
        return self._gradients


class _Claim:
    """Held by the graph of autograd whose activations lie in the memory that captures share."""


class _Replayed(torch.autograd.Function):
    """The gradients of the weights are added here; the first of them stands for all."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, values: Tensor, captured: CudaGraphs, weights: list[Tensor]
    ) -> Tensor:
        ctx.captured, ctx.weights = captured, weights
        return captured.forward(values).clone()

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        for weight in ctx.weights:
            if weight.grad is not None:  # it may be the buffer that is about to be written
                weight.grad = weight.grad.clone()
        add_gradients(ctx.captured.backward(grad), ctx.weights)
        ctx.claim = None
        return None, None, None, None


class EncoderGraphs:
    """Rows of the tokens that are read, by graphs of the buckets that come back; those that were
    not asked for longest make room.

    While the last graph of autograd is still to be gone back through, as of the micro-batch before,
    its activations lie in the memory of all captures: what comes meanwhile is computed without one,
    to the same numbers.

    Args:
        architecture: of the model.
        layers: its steps; weights are copied by their owner.
        dtype: of products.
        seed: of all dropout.

    Raises:
        ValueError: the model has a part that can't be captured.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: Sequence[Any],
        dtype: torch.dtype,
        *,
        seed: int,
    ) -> None:
        embeddings = FusedEmbeddings.find(architecture.embeddings)
        plain = all(isinstance(one, PostNormStep) and one.trains for one in layers)
        if embeddings is None or not plain or not layers[-1].one_token:
            raise ValueError(
                "cuda_graphs must be off here: expected BERT's or RoBERTa's embeddings and layers, "
                "without adapters, hooks or pooling, of which every part has a kernel"
            )
        self._architecture, self._embeddings = architecture, embeddings
        self._layers, self._dtype, self._seed = layers, dtype, seed
        self._words = architecture.word_embeddings
        self._captured: OrderedDict[Any, CudaGraphs] = OrderedDict()  # by bucket and mode
        self._pool: Any = None
        self._claim: weakref.ref[_Claim] | None = None  # the last one
        norm = embeddings.norm
        tables = (self._words.weight, embeddings.positions.weight, embeddings.types.weight)
        known = [*tables, norm.weight, norm.bias, *(w for one in layers for w in one.trained)]
        self.weights = [weight for weight in known if weight.requires_grad]

    def __call__(
        self, words: np.ndarray, positions: np.ndarray, types: np.ndarray, starts: np.ndarray
    ) -> Tensor:
        """(N, H) rows of the read tokens of N sequences.

        Args:
            words: (T,) ids.
            positions: (T,) of the tokens.
            types: (T,) of the tokens.
            starts: (N + 1,) where the sequences begin, and T.
        """
        num_sequences = len(starts) - 1
        bucket = Bucket.of(len(words), num_sequences)
        values = self._upload(bucket, words, positions, types, starts)
        read = self._read(bucket, values)
        return read[:num_sequences]

    def _read(self, bucket: Bucket, values: Tensor) -> Tensor:
        is_claimed = self._claim is not None and self._claim() is not None
        if is_claimed or not (torch.is_grad_enabled() and self.weights):
            return self.encode(bucket, values)
        key = bucket, self._architecture.embeddings.training  # type: ignore[union-attr]
        if key not in self._captured:
            while len(self._captured) >= MOST_GRAPHS:
                self._captured.popitem(last=False)
            if self._pool is None and values.is_cuda:
                self._pool = torch.cuda.graph_pool_handle()

            def encode(given: Tensor) -> Tensor:
                return self.encode(bucket, given)

            # The stream that captures is one of the current device.
            with torch.cuda.device_of(values):
                self._captured[key] = CudaGraphs(encode, values, self.weights, self._pool)
        self._captured.move_to_end(key)
        read = _Replayed.apply(self.weights[0], values, self._captured[key], self.weights)
        read.grad_fn.claim = claim = _Claim()
        self._claim = weakref.ref(claim)
        return read

    def encode(self, bucket: Bucket, values: Tensor) -> Tensor:
        """(bucket's sequences, H) rows, from what _upload gave."""
        tokens, sequences = bucket.tokens, bucket.sequences
        tables = self._words.num_embeddings, self._embeddings.positions.num_embeddings
        sizes = [TokenPlaces.size(tokens, *tables), sequences + 1, sequences + 1, tokens, sequences]
        found, ends, one_each, rows, sequence_rows = values.split_with_sizes(sizes)
        places = TokenPlaces.within(found, tokens, tables[0])
        reads_last = self._architecture.reads == "last"
        batch = MicroBatch(
            ends,
            one_each,
            (ends[1:] - 1 if reads_last else ends[:-1]).long(),
            {},
            np.full(sequences, tokens),  # the most that they could be
            rows,
            sequence_rows,
            reads_last=reads_last,
        )
        x: Tensor
        wide, x, batches = self._seeded(places, batch)
        for layer, layer_batch in zip(self._layers, batches, strict=True):
            wide, x = layer(wide, x, layer_batch)
        return wide.to(self._words.weight.dtype)

    def _seeded(
        self, places: TokenPlaces, batch: MicroBatch
    ) -> tuple[Tensor, Tensor, list[LayerBatch]]:
        """The first layer's rows and all layers' batches, their seeds the run's."""
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._seed)
        try:
            weight = self._words.weight
            wide, x = self._embeddings(weight, places, batch.token_rows, self._dtype)
            return wide, x, prepare_layers(self._layers, batch)
        finally:
            torch.default_generator.set_state(state)

    def _upload(
        self,
        bucket: Bucket,
        words: np.ndarray,
        positions: np.ndarray,
        types: np.ndarray,
        starts: np.ndarray,
    ) -> Tensor:
        """All that a step's encoder reads, filled up to the bucket, as int32 in one copy."""
        num_tokens, added = len(words), bucket.tokens - len(words)
        more = bucket.sequences - (len(starts) - 1)
        # Copies of the first token, spread over the sequences.
        words, positions, types = (
            np.concatenate([one, np.full(added, one[0])]) for one in (words, positions, types)
        )
        ends = np.concatenate([starts, num_tokens + np.arange(1, more + 1) * added // more])
        first = int(torch.randint(_MOST_ROWS, ()))
        padding = self._words.padding_idx
        places = TokenPlaces.values(
            *(words, positions, types, self._words.num_embeddings, self._embeddings.positions),
            words_unread=padding,
        )
        parts = [
            places,
            ends,
            np.arange(len(ends)),
            first + np.arange(bucket.tokens),
            first + np.arange(bucket.sequences),
        ]
        return upload(np.concatenate(parts).astype(np.int32), self._words.weight.device)

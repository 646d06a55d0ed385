"""Encoders in buckets of tokens, each captured as CUDA graphs and replayed.

A step of a small model, or the scores of a few pairs, are bound by launches: a replay is one. What
is captured must not change from call to call but for the values of its inputs, so that

- tokens and sequences are rounded up to a bucket, from which all shapes follow: sequences that
  nobody reads take the rest, and get no gradient;
- the whole table of words is read, whose number is no step's;
- dropout's seeds are the run's, and the numbers of rows in it begin at one that is drawn for each
  step: a counter, which the kernels hash with the seed;
- head, loss and optimizer, which depend on lists or on the host's numbers, stay outside.

Experimental: no GPU has run it.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from rerank_fast.model.packed.bucket_encoder import BucketEncoder, refuse
from rerank_fast.model.packed.buckets import COARSE, FINE, Bucket
from rerank_fast.model.packed.captures import Claim, CudaGraph, CudaGraphs, Replayed, warm_up
from rerank_fast.model.random_state import nothing_drawn, random_state

MOST_TRAINING = 8  # each keeps the gradients of all weights
MOST_SCORING = 64  # their activations share memory
# Of a batch that is scored by a graph: with more the device takes longer than the host to launch.
MOST_TOKENS = 16384

Graphs = TypeVar("Graphs")


def has_graphs(device: torch.device) -> bool:
    """Whether a device captures."""
    return device.type == "cuda" and torch.version.hip is None


class _Kept(Generic[Graphs]):
    """What was captured, by bucket and modes; those that were not asked for longest make room."""

    def __init__(self, encoder: BucketEncoder, most: int) -> None:
        self._encoder, self._most = encoder, most
        self._graphs: OrderedDict[Any, Graphs] = OrderedDict()
        self._taken: list[Any] = []  # where all lies that they read
        self._pool: Any = None  # of the memory that they share

    def find(
        self, bucket: Bucket, values: Tensor, capture: Callable[[Any], Graphs | None]
    ) -> Graphs | None:
        """Those of a bucket; capture makes them in a pool of memory, where they are not there or a
        weight has moved. None: there is nothing to capture.
        """
        if (taken := self._encoder.tensors()) != self._taken:
            self._graphs.clear()
            self._taken = taken
        key = bucket, self._encoder.modes()
        if key not in self._graphs:
            while len(self._graphs) >= self._most:
                self._graphs.popitem(last=False)
            if self._pool is None and values.is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.device_of(values):  # the stream that captures is the current device's
                made = capture(self._pool)
            if made is None:
                return None
            self._graphs[key] = made
        self._graphs.move_to_end(key)
        return self._graphs[key]


class TrainingGraphs:
    """Rows of the tokens that are read, with gradients.

    While the last graph of autograd is still to be gone back through, as of the micro-batch before,
    its activations lie in the memory of all captures: what comes meanwhile is computed without one,
    to the same numbers.

    Args:
        encoder: of layers that train, with a seed.
    """

    def __init__(self, encoder: BucketEncoder) -> None:
        self._encoder = encoder
        self._kept: _Kept[CudaGraphs] = _Kept(encoder, MOST_TRAINING)
        self._claim: weakref.ref[Claim] | None = None  # the last one

    def serves(self, num_tokens: int) -> bool:
        """Whether it encodes batches of so many tokens."""
        return num_tokens > 0

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
        bucket = Bucket.of(len(words), len(starts) - 1, FINE)
        values = self._encoder.layout.upload(bucket, words, positions, types, starts)
        return self._read(bucket, values)[: len(starts) - 1]

    def _read(self, bucket: Bucket, values: Tensor) -> Tensor:
        is_claimed = self._claim is not None and self._claim() is not None
        captured = None
        if torch.is_grad_enabled() and not is_claimed:
            captured = self._kept.find(
                bucket, values, lambda pool: self._capture(bucket, values, pool)
            )
        if captured is None:
            return self._encoder(bucket, values)
        read = Replayed.apply(captured.weights[0], values, captured)
        read.grad_fn.claim = claim = Claim()
        self._claim = weakref.ref(claim)
        return read

    def _capture(self, bucket: Bucket, values: Tensor, pool: Any) -> CudaGraphs | None:
        """None where no weight gets a gradient."""

        def encode(given: Tensor) -> Tensor:
            return self._encoder(bucket, given)

        before = random_state(values.device)
        read = encode(values)
        if not nothing_drawn(before, random_state(values.device)):
            refuse("dropout that is drawn by torch")
        if not read.requires_grad:
            return None
        weights = [one for one in self._encoder.parameters if one.requires_grad]
        found = torch.autograd.grad(read, weights, torch.zeros_like(read), allow_unused=True)
        reached: list[Tensor] = [
            one for one, grad in zip(weights, found, strict=True) if grad is not None
        ]
        del read, found
        return CudaGraphs(encode, values, reached, pool)


class ScoringGraphs:
    """Rows of the tokens that are read, without gradients, in several threads at once: one replays
    at a time.

    Args:
        encoder: of layers that don't train, without a seed.
    """

    def __init__(self, encoder: BucketEncoder) -> None:
        self._encoder = encoder
        self._kept: _Kept[CudaGraph[Tensor]] = _Kept(encoder, MOST_SCORING)
        self._lock = threading.Lock()
        self._done: Any = None  # an event behind the last replay, whichever stream it was in

    def serves(self, num_tokens: int) -> bool:
        """Whether it encodes batches of so many tokens."""
        return 0 < num_tokens <= MOST_TOKENS

    def __call__(
        self, words: np.ndarray, positions: np.ndarray, types: np.ndarray, starts: np.ndarray
    ) -> Tensor:
        """(N, H) rows of the read tokens of N sequences; see TrainingGraphs."""
        bucket = Bucket.of(len(words), len(starts) - 1, COARSE)
        values = self._encoder.layout.upload(bucket, words, positions, types, starts)
        with self._lock:
            stream = torch.cuda.current_stream(values.device) if values.is_cuda else None
            if stream is not None and self._done is not None:
                stream.wait_event(self._done)
            captured = self._kept.find(
                bucket, values, lambda pool: self._capture(bucket, values, pool)
            )
            assert captured is not None
            read = captured(values)[: len(starts) - 1].clone()
            if stream is not None:
                self._done = stream.record_event()
        return read

    # Not in inference mode, whose tensors could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, bucket: Bucket, values: Tensor, pool: Any) -> CudaGraph[Tensor]:
        given = values.clone()

        def encode(given: Tensor) -> Tensor:
            return self._encoder(bucket, given)

        warm_up(lambda: encode(given), values.device)
        # Other threads may meanwhile allocate and copy.
        return CudaGraph(encode, given, pool, capture_error_mode="thread_local")

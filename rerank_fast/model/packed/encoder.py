"""Padding-free execution of Hugging Face encoders: flat runs of tokens, a last layer for what is
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rerank_fast.model.packed.architectures import Architecture, Decoder
from rerank_fast.model.packed.compilation import Compiler, compiled_layer
from rerank_fast.model.packed.embeddings import (
    DistinctRows,
    TokenPlaces,
    WordPlaces,
)
from rerank_fast.model.packed.graphs import ScoringGraphs, TrainingGraphs
from rerank_fast.model.packed.heads import cut, cut_head
from rerank_fast.model.packed.layers import (
    EncodedBatch,
    LayerBatch,
    MicroBatch,
    Rows,
    dropped,
    prepare_layers,
    run_layer,
)
from rerank_fast.model.packed.norm import norm
from rerank_fast.model.packed.pre_norm_step import PreNormStep
from rerank_fast.model.packed.ready_layers import ReadyLayers, Step, finished, summed
from rerank_fast.model.random_state import nothing_drawn, random_state
from rerank_fast.model.tokens.packing import TokenizedPairs, fill_up, upload
from rerank_fast.ops.layer_kernels import triton_serves


class PackedPairs:
    """A model's scores of pairs, micro-batch by micro-batch, with what these share made once.

    Weights are cast to the compute dtype once, and the rows of the word embeddings that any pair
    needs are gathered once, so that their gradient is scattered once a step instead of once a
    micro-batch. The graph of the step hangs on both: make a new one after every change of the
    weights.

    Args:
        architecture: of the model.
        tokens: all pairs of the step.
        dtype: of products and attention: fp32, bf16 or, on a GPU, fp16. Sums of the residual
            stream, norms and scores are fp32.
        gradient_checkpointing: compute the inside of every layer again in backward.
        compiler: torch.compile's backend for the layers; None runs them eagerly. On a CPU without
            gradients they are eager all the same: oneDNN's own products are faster there than what
            is compiled.
        ready: the layers of an earlier step, whose graph is done with; None makes new ones.
        graphs: of these layers, run them.

    Attributes:
        draws_by_row: whether all that was dropped inside the layers so far follows from a seed and
            a row, as the ops' dropout does. False once a module there has drawn from torch's
            generators, as an adapter's dropout does. Looked at where the step is made with
            gradients on.
    """

    padded = False

    def __init__(
        self,
        architecture: Architecture,
        tokens: TokenizedPairs,
        *,
        dtype: torch.dtype,
        gradient_checkpointing: bool = False,
        compiler: Compiler | None = None,
        ready: ReadyLayers | None = None,
        graphs: TrainingGraphs | ScoringGraphs | None = None,
    ) -> None:
        self.architecture, self.tokens, self.dtype = architecture, tokens, dtype
        self.gradient_checkpointing = gradient_checkpointing and torch.is_grad_enabled()
        self._graphs = graphs
        # Where graphs number the rows, one run of them all has another number than of some.
        self.draws_by_row = graphs is None
        weight = architecture.word_embeddings.weight
        self.device, self.width = weight.device, weight.shape[1]
        kind = self.device.type
        compiles = torch.is_grad_enabled() or kind != "cpu"
        self.compiled = compiled_layer(compiler) if compiler is not None and compiles else None
        # A caller's autocast would narrow the score head; what is to be narrow is cast here.
        autocasts = torch.amp.is_autocast_available(kind)  # a meta device has none
        self.region: AbstractContextManager[object] = nullcontext()
        if autocasts:
            self.region = torch.autocast(kind, enabled=False)
        if architecture.unread_token_id is not None:
            self.tokens = tokens = tokens.without_trailing(architecture.unread_token_id)
        if ready is None:
            ready = ReadyLayers(
                architecture, dtype, len(tokens.input_ids), compiles=self.compiled is not None
            )
        ready.fill()
        self.layers, self.decoder_layers = ready.layers, ready.decoder_layers
        self._embeddings = ready.embeddings
        self._looks_at_draws = torch.is_grad_enabled() and not ready.calls_no_module
        ids = tokens.input_ids
        if architecture.decoder is not None:  # behind them all: its row is gathered with theirs
            ids = np.append(ids, architecture.decoder.start_token_id)
        self._rows, self._rows_of_tokens = weight, ids
        if graphs is None and torch.is_grad_enabled() and weight.requires_grad:
            used, self._rows_of_tokens = _distinct(ids, len(weight))
            padding = architecture.word_embeddings.padding_idx
            unread = padding if padding is not None and padding in used else None
            self._rows = DistinctRows.apply(weight, upload(used, weight.device), unread)
        self._on_triton = triton_serves(self.device, dtype)

    def __call__(self, indices: np.ndarray, keep: np.ndarray | None = None) -> Tensor:
        """(M,) fp32 scores of the pairs at the (M,) indices, in their order.

        With keep, an (M,) mask, those of the pairs under it alone, and with the dropout that they
        have among all M: from the same random state, and where the step draws_by_row, they are the
        same scores.
        """
        flat, starts = self.tokens.flat_index(indices)
        device, num_pairs = self._rows.device, len(indices)
        positions = self._positions(flat, starts)
        types = self.tokens.token_type_ids
        type_ids = np.zeros(len(flat), np.int64) if types is None else types[flat].astype(np.int64)
        if self._graphs is not None and self._graphs.serves(len(flat)):
            read = self._graphs(self.tokens.input_ids[flat], positions, type_ids, starts)
            scores = self.architecture.head(read).float()
            if keep is None or keep.all():
                return scores
            return scores.index_select(0, upload(np.flatnonzero(keep), device))
        # What is added stands behind the pairs: theirs are the places, and so the dropout, that
        # they have without.
        fills = device.type == "cpu" and num_pairs > 0
        if fills:
            filled, starts = fill_up(starts)
            flat, positions, type_ids = flat[filled], positions[filled], type_ids[filled]
        architecture = self.architecture
        places: np.ndarray | None = None
        pairs: Tensor | None = None
        num_sequences = len(starts) - 1
        if keep is not None and not keep.all():
            # The embeddings' dropout, as the head's below, is drawn for all.
            lengths = np.diff(starts)[:num_pairs]
            places, kept = np.flatnonzero(np.repeat(keep, lengths)), np.flatnonzero(keep)
            starts = np.concatenate([[0], np.cumsum(lengths[keep])])
            if fills:
                added, starts = fill_up(starts)
                places = places[added]
            pairs = upload(kept, device)
        lengths = np.diff(starts)
        wide, x, position_ids, tokens = self._embed(flat, positions, type_ids, places)
        cu_seqlens, one_each = upload(
            np.stack([starts, np.arange(len(starts))]).astype(np.int32), device
        )
        batch = MicroBatch(
            cu_seqlens,
            one_each,
            upload(starts[1:] - 1 if architecture.reads == "last" else starts[:-1], device),
            {} if architecture.rotary is None else architecture.rotary(wide, position_ids),
            lengths,
            tokens,
            None if pairs is None else F.pad(pairs.int(), (0, len(lengths) - len(pairs))),
            reads_last=architecture.reads == "last",
        )
        prepared = prepare_layers(self.layers, batch)
        of_decoder = self._prepare_decoder(batch)
        before = random_state(device) if self._looks_at_draws else None
        wide = finished(architecture, self._run(self.layers, prepared, wide, x))
        if architecture.decoder is not None:
            wide = self._decoded(architecture.decoder, wide, of_decoder, batch)
        if before is not None and not nothing_drawn(before, random_state(device)):
            self.draws_by_row = False
        if architecture.pool is not None:
            owner = upload(np.repeat(np.arange(len(lengths)), lengths), device)
            wide = architecture.pool(wide, cu_seqlens, owner)
        read = wide.to(self._rows.dtype)
        if pairs is None:
            scores = architecture.head(read).to(wide.dtype)
            return scores[:num_pairs] if fills else scores
        among_all = read.new_zeros(num_sequences, read.shape[1])
        among_all = among_all.index_copy(0, pairs, read[: len(pairs)])
        return architecture.head(among_all).to(wide.dtype).index_select(0, pairs)

    def _run(
        self,
        layers: Sequence[Step],
        prepared: Sequence[LayerBatch],
        wide: Tensor,
        x: Rows | None,
    ) -> Tensor:
        """The residual stream behind all layers."""
        for layer, batch in zip(layers, prepared, strict=True):
            # One row to compute is no dynamic number of them: it would be a graph of its own.
            assert batch.max_seqlens is not None
            one_row = len(batch.cu_queries) == 2 and batch.max_seqlens[0] == 1
            run = run_layer if self.compiled is None or one_row else self.compiled
            if self.gradient_checkpointing:
                wide, x = checkpoint(run, layer, wide, x, batch, use_reentrant=False)
            else:
                wide, x = run(layer, wide, x, batch)
        return summed(layers, wide, x)

    def _prepare_decoder(self, batch: MicroBatch) -> list[LayerBatch]:
        """For its one token of each sequence."""
        if not self.decoder_layers:
            return []
        single = replace(
            batch,
            cu_seqlens=batch.one_each,
            lengths=np.ones_like(batch.lengths),
            token_rows=batch.sequence_rows,
        )
        return prepare_layers(self.decoder_layers, single)

    def _decoded(
        self, decoder: Decoder, encoded: Tensor, prepared: list[LayerBatch], batch: MicroBatch
    ) -> Tensor:
        """(N, H) of the token that the decoder starts with, from (T, H) of the encoder."""
        # Wide enough for the stream, whatever the weights of the last norm are in.
        dtype = torch.promote_types(self.dtype, torch.float32)
        start = self._rows.narrow(0, int(self._rows_of_tokens[-1]), 1)
        wide = decoder.embed(start.expand(len(batch.lengths), -1)).to(dtype)
        reads = EncodedBatch(encoded.to(dtype), batch.cu_seqlens, int(batch.lengths.max()))
        prepared = [replace(one, encoded=reads) for one in prepared]
        wide = norm(self._run(self.decoder_layers, prepared, wide, None), decoder.final_norm)
        return dropped(wide.to(dtype), decoder.final_dropout)

    def _embed(
        self, flat: np.ndarray, positions: np.ndarray, types: np.ndarray, places: np.ndarray | None
    ) -> tuple[Tensor, Rows | None, Tensor, Tensor | None]:
        """The first layer's rows, wide and as products read them, and their positions.

        Last, where only the tokens at some places are to be computed, these as they stand for them
        in dropout.
        """
        device, words = self.device, self._rows_of_tokens[flat]
        # Before the first pre-norm layer nothing is left to be added.
        pre_norm = isinstance(self.layers[0], PreNormStep)
        tokens = None if places is None else upload(places.astype(np.int32), device)
        if self._embeddings is not None:
            if places is not None:
                words, positions, types = words[places], positions[places], types[places]
            table = self._embeddings.positions
            token_places = TokenPlaces.of(words, positions, types, len(self._rows), table, device)
            wide, narrow = self._embeddings(self._rows, token_places, tokens, self.dtype)
            return wide, None if pre_norm else narrow, token_places.ids[1:2], tokens
        position_ids = upload(positions, device)[None]
        if self._on_triton and self._rows.requires_grad and torch.is_grad_enabled():
            found = upload(WordPlaces.values(words, len(self._rows)), device)
            rows = WordPlaces.within(found, len(words)).rows(self._rows)
        else:
            rows = F.embedding(upload(words, device), self._rows)
        embedded = self.architecture.embed(
            rows[None],
            upload(types, device)[None],
            position_ids,
        ).squeeze(0)
        if tokens is not None:
            embedded, position_ids = (
                embedded.index_select(0, tokens),
                position_ids.index_select(1, tokens),
            )
        # A view in one layer and none in the next would be two graphs.
        wide = embedded.to(
            torch.promote_types(self.dtype, torch.float32), copy=self.compiled is not None
        )
        return wide, None if pre_norm else wide.to(self.dtype), position_ids, tokens

    def separate(self) -> list[tuple[Tensor, Tensor]]:
        """Cut what the micro-batches share off from the weights, so that each can have a backward
        of its own.

        Returns:
            Each shared tensor with the leaf that now stands in for it: when all micro-batches are
            done, the leaf's .grad is what the shared tensor must still pass on.
        """
        return [*cut(self, "_rows"), *cut_head(self.architecture.head)]

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


def _distinct(ids: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The (U,) ids below limit that are there, rising, and for each of the (T,) ids its place among
    them.

    np.unique would sort them, which takes longer than the rest of a step's preparation.
    """
    there = np.zeros(limit, bool)
    there[ids] = True
    used = np.flatnonzero(there)
    places = np.empty(limit, np.int64)
    places[used] = np.arange(len(used))
    return used, places[ids]

"""Embeddings on a GPU: BERT's gathered, normed and dropped out at once, others' words gathered;
their gradients in the host's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.tokens.packing import upload
from rerank_fast.ops.differentiated_once import differentiated_once

_MAX_WIDTH, _MOST_TYPES = 4096, 2  # of the kernels
# Whose forward is dropout(LayerNorm(words + token_type_embeddings + position_embeddings)).
_KNOWN = [
    f"transformers.models.{module}.{name}Embeddings"
    for module, name in (
        ("bert.modeling_bert", "Bert"),
        ("roberta.modeling_roberta", "Roberta"),
        ("xlm_roberta.modeling_xlm_roberta", "XLMRoberta"),
        ("camembert.modeling_camembert", "Camembert"),
        ("electra.modeling_electra", "Electra"),
        ("data2vec.modeling_data2vec_text", "Data2VecText"),
        ("xmod.modeling_xmod", "Xmod"),
        ("roberta_prelayernorm.modeling_roberta_prelayernorm", "RobertaPreLayerNorm"),
    )
]


class DistinctRows(torch.autograd.Function):
    """Rows of a table, none twice: their gradients are copied, where F.embedding's backward would
    sort them.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, unread: int | None) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.unread = table.shape, unread
        return table.index_select(0, index)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        gradient = grad.new_zeros(ctx.shape).index_copy_(0, index, grad)
        if ctx.unread is not None:  # the padding token has none
            gradient[ctx.unread].zero_()
        return gradient, None, None


def _in_order(ids: np.ndarray, count: int, unread: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of each of so many rows, row by row, and how many these have; those of the unread
    row are in none.
    """
    placed = np.argsort(ids.astype(np.uint16), kind="stable")  # by radix, as all of 16 bits
    if count > 2**16:
        placed = placed[np.argsort((ids >> 16).astype(np.uint16)[placed], kind="stable")]
    found = np.bincount(ids, minlength=count)
    if unread is not None and found[unread]:
        placed = placed[ids[placed] != unread]
        found[unread] = 0
    return placed, found


@dataclass(frozen=True)
class WordPlaces:
    """Where the T tokens' rows of the words are, and the tokens of each row in order."""

    ids: Tensor  # (T,) int32
    order: Tensor  # (T,) int32 tokens
    starts: Tensor  # (U + 1,) int32: where each row's begin in the order

    @staticmethod
    def size(num_tokens: int, num_words: int) -> int:
        """How many values() there are."""
        return 2 * num_tokens + num_words + 1

    @staticmethod
    def within(values: Tensor, num_tokens: int) -> WordPlaces:
        """The parts of uploaded values()."""
        rest = len(values) - 2 * num_tokens
        return WordPlaces(*values.split_with_sizes([num_tokens, num_tokens, rest]))

    @staticmethod
    def values(words: np.ndarray, num_words: int, unread: int | None = None) -> np.ndarray:
        """int32 ids, order and starts, one after the other; tokens of the unread row are in no
        row's order, and zeros make up for them at its end.
        """
        order, counts = _in_order(words, num_words, unread)
        filled = np.zeros(len(words) - len(order) + 1, int)
        return np.concatenate([words, order, filled, np.cumsum(counts)]).astype(np.int32)

    def rows(self, table: Tensor) -> Tensor:
        """(T, H) of the (U, H) table."""
        return _Gathered.apply(table, self)


class _Gathered(torch.autograd.Function):
    """Each row's gradients are summed by one kernel; F.embedding's backward would sort them in
    some ten.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, places: WordPlaces) -> Tensor:
        ctx.places = places
        return table.index_select(0, places.ids)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from rerank_fast.ops.triton.embedding import segment_sums

        places: WordPlaces = ctx.places
        sums = segment_sums(grad.float().contiguous(), places.order, places.starts)
        return sums.to(grad.dtype), None


@dataclass(frozen=True)
class TokenPlaces:
    """Where the T tokens' rows are, and the tokens of each row in order: words' first, then
    positions'.
    """

    ids: Tensor  # (3, T) int32 of words, positions and types
    order: Tensor  # int32 tokens
    starts: Tensor  # (U + P + 1,) int32: where each row's begin in the order
    num_words: int  # U

    @staticmethod
    def of(
        words: np.ndarray,  # (T,) rows of the words
        positions: np.ndarray,
        types: np.ndarray,
        num_words: int,
        positions_table: nn.Embedding,
        device: torch.device,
    ) -> TokenPlaces:
        """One upload of all of them."""
        found = TokenPlaces.values(words, positions, types, num_words, positions_table)
        return TokenPlaces.within(upload(found, device), len(words), num_words)

    @staticmethod
    def size(num_tokens: int, num_words: int, num_positions: int) -> int:
        """How many values() there are."""
        return 5 * num_tokens + 1 + num_words + num_positions

    @staticmethod
    def within(values: Tensor, num_tokens: int, num_words: int) -> TokenPlaces:
        """The parts of uploaded values()."""
        rest = len(values) - 5 * num_tokens
        flat, tokens, starts = values.split_with_sizes([3 * num_tokens, 2 * num_tokens, rest])
        return TokenPlaces(flat.view(3, num_tokens), tokens, starts, num_words)

    @staticmethod
    def values(
        words: np.ndarray,
        positions: np.ndarray,
        types: np.ndarray,
        num_words: int,
        positions_table: nn.Embedding,
        words_unread: int | None = None,
    ) -> np.ndarray:
        """int32 ids, order and starts, one after the other; tokens of unread rows are in no row's
        order, and zeros make up for them at its end.
        """
        num_tokens, padding = len(words), positions_table.padding_idx
        order: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for ids, count, unread in (
            (words, num_words, words_unread),
            (positions, positions_table.num_embeddings, padding),
        ):
            placed, found = _in_order(ids, count, unread)
            order.append(placed)
            counts.append(found)
        unplaced = 2 * num_tokens - sum(map(len, order))
        parts = [
            *(words, positions, types, *order, np.zeros(unplaced + 1, int)),
            np.cumsum(np.concatenate(counts)),
        ]
        return np.concatenate(parts).astype(np.int32)


class FusedEmbeddings:
    """The embeddings module of a BERT-like model through one kernel.

    Args:
        module: of a family that is known, all parts plain; see find.
    """

    def __init__(self, module: Any) -> None:
        self.positions: nn.Embedding = module.position_embeddings
        self.types: nn.Embedding = module.token_type_embeddings
        self.norm: nn.LayerNorm = module.LayerNorm
        self.dropout: nn.Dropout = module.dropout

    @staticmethod
    def find(module: nn.Module | None) -> FusedEmbeddings | None:
        """None where a part is not what its library made it."""
        if f"{type(module).__module__}.{type(module).__name__}" not in _KNOWN:
            return None
        made: Any = module
        parts = [made.position_embeddings, made.token_type_embeddings, made.LayerNorm, made.dropout]
        plain = zip(parts, (nn.Embedding, nn.Embedding, nn.LayerNorm, nn.Dropout), strict=True)
        if not all(type(part) is kind for part, kind in plain) or any(
            map(must_be_called, [made, *parts])
        ):
            return None
        tables = (made.word_embeddings, *parts[:2])
        if any(one.max_norm is not None or one.scale_grad_by_freq or one.sparse for one in tables):
            return None
        if (
            made.token_type_embeddings.num_embeddings > _MOST_TYPES
            or parts[1].padding_idx is not None
        ):
            return None
        width = made.LayerNorm.weight.numel()
        return (
            FusedEmbeddings(made)
            if width == made.word_embeddings.embedding_dim <= _MAX_WIDTH
            else None
        )

    def __call__(
        self, words: Tensor, places: TokenPlaces, rows: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(T, H) fp32, and the same in dtype.

        Args:
            words: (U, H) rows of the word embeddings.
            places: of the tokens.
            rows: (T,) int32 numbers of the tokens in the dropout; None: 0 to T - 1.
            dtype: of products.
        """
        p = float(self.dropout.p) if self.dropout.training else 0.0
        seed = int(torch.randint(2**62, ())) if p else 0
        norm = self.norm
        tensors = (words, self.positions.weight, self.types.weight, norm.weight, norm.bias)
        y, narrow = _Embedded.apply(*tensors, places, rows if p else None, dtype, norm.eps, p, seed)
        return y, y if narrow is None else narrow


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        words: Tensor,
        positions: Tensor,
        types: Tensor,
        weight: Tensor,
        bias: Tensor,
        places: TokenPlaces,
        rows: Tensor | None,
        dtype: torch.dtype,
        eps: float,
        dropout_p: float,
        seed: int,
    ) -> tuple[Tensor, Tensor | None]:
        from rerank_fast.ops.triton.embedding import embed_norm

        wide, tables = weight.float(), (words, positions, types)
        y, narrow, *stats = embed_norm(
            *tables, places.ids, wide, bias.float(), rows, dtype, eps, dropout_p, seed
        )
        ctx.save_for_backward(*tables, wide, *stats, rows)
        ctx.places, ctx.options, ctx.bias_dtype = places, (dropout_p, seed), bias.dtype
        ctx.weight_dtype = weight.dtype
        ctx.set_materialize_grads(False)
        return y, None if dtype == torch.float32 else narrow

    @staticmethod
    @differentiated_once
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_narrow: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from rerank_fast.ops.triton.column_sums import column_sums
        from rerank_fast.ops.triton.embedding import embed_norm_grads, segment_sums

        words, positions, types, weight, mean, rstd, rows = ctx.saved_tensors
        places: TokenPlaces = ctx.places
        if grad_y is None:
            assert grad_narrow is not None
            grad_y, grad_narrow = grad_narrow.float(), None
        saved = (words, positions, types, places.ids, weight, mean, rstd, rows)
        d_total, sums = embed_norm_grads(*saved, grad_y, grad_narrow, *ctx.options)
        width, num_types = d_total.shape[1], types.shape[0]
        d_weight, d_bias, d_types = column_sums(sums, None, None).split(
            [width, width, num_types * width]
        )
        d_rows = segment_sums(d_total, places.order, places.starts)
        d_words, d_positions = d_rows.split([places.num_words, positions.shape[0]])
        tables = (
            d_words.to(words.dtype),
            d_positions.to(positions.dtype),
            d_types.view_as(types).to(types.dtype),
        )
        return *tables, d_weight.to(ctx.weight_dtype), d_bias.to(ctx.bias_dtype), *[None] * 6

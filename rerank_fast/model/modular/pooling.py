"""Token embeddings to one embedding a text, in each of sentence-transformers' modes, without
padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (T, H) token embeddings, (N + 1,) cumulative tokens, (T,) sequence of each token -> (N, F)
Pool = Callable[[Tensor, Tensor, Tensor], Tensor]

# As older releases named them, in the order in which they lay the results side by side.
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _summed(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    """(N, H) sums in fp32 at least."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.new_zeros(len(ends) - 1, rows.shape[1]).index_add(0, owner, wide)


def _lengths(ends: Tensor) -> Tensor:
    """(N, 1)."""
    return ends.diff().clamp(min=1)[:, None]


def _first(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    return rows.index_select(0, ends[:-1].long())


def _last(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    return rows.index_select(0, ends[1:].long() - 1)


def _max(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    least = rows.new_full((len(ends) - 1, rows.shape[1]), float("-inf"))
    return least.scatter_reduce(0, owner[:, None].expand_as(rows), rows, "amax")


def _mean(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    return _summed(rows, ends, owner) / _lengths(ends)


def _mean_sqrt(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
    return (
        _summed(rows, ends, owner)
        / _lengths(ends).to(torch.promote_types(rows.dtype, torch.float32)).sqrt()
    )


def _weighted_mean(rows: Tensor, ends: Tensor, owner: Tensor, before: int = 0) -> Tensor:
    """Weights rise with the place of a token: 1, 2, 3, ...; the first has the place before + 1."""
    first = ends[:-1].long().index_select(0, owner)
    place = torch.arange(1 + before, len(rows) + 1 + before, device=rows.device) - first
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    lengths = _lengths(ends)
    total = lengths * (lengths + 1) // 2 + lengths * before
    return _summed(wide * place[:, None], ends, owner) / total


_POOLS: dict[str, Pool] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def pool_by(modes: Sequence[str], before: int = 0) -> Pool:
    """What pools a flat run of sequences by each of the modes, results side by side.

    before: of each sequence, the tokens in front of it that were left out.
    """
    pools = _POOLS | {"weightedmean": functools.partial(_weighted_mean, before=before)}

    def pool(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
        return torch.cat([pools[mode](rows, ends, owner).to(rows.dtype) for mode in modes], dim=1)

    return pool


def pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    """The modes that the config of a Pooling module names, in today's or an older release's way.

    Raises:
        ValueError: one is not known.
    """
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for name, mode in _LEGACY.items() if config.get(name)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or (unknown := [mode for mode in modes if mode not in _POOLS]):
        raise ValueError(
            f"expected pooling modes of {', '.join(_POOLS)}, got {(unknown if modes else modes)!r}"
        )
    return modes


class Pooling(nn.Module):
    """token_embeddings (B, T, H) under attention_mask (B, T) to sentence_embedding (B, modes * H).

    Without include_prompt the first prompt_length (B,) tokens of each are passed over. Of a text
    that has no others cls reads the first token, and the other modes give 0.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.pooling_mode = pooling_modes(config)
        self.include_prompt = bool(config.get("include_prompt", True))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask, before = features["attention_mask"].bool(), 0
        some = mask.new_ones(len(mask), 1)
        if not self.include_prompt and "prompt_length" in features:
            before = int(features["prompt_length"][0])
            place = mask.cumsum(dim=1)
            some = (place > before).any(dim=1, keepdim=True)
            mask = mask & torch.where(some, place > before, place == 1)
        ends = F.pad(mask.sum(dim=1).cumsum(0), (1, 0))
        owner = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
        rows = features["token_embeddings"][mask]
        pooled = [
            one if mode == "cls" else torch.where(some, one, 0)
            for mode in self.pooling_mode
            for one in [pool_by([mode], before)(rows, ends, owner)]
        ]
        return features | {"sentence_embedding": torch.cat(pooled, dim=1)}

    def extra_repr(self) -> str:
        return ", ".join(self.pooling_mode)

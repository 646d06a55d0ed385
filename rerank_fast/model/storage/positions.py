"""How many tokens a model has positions for, read off its embeddings."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.texts import shown

logger = logging.getLogger(__name__)

# As libraries name the table of learned positions; tables of distances have other names.
_TABLES = ("position_embeddings", "embed_positions", "wpe")


def max_positions(name: str, model: Any) -> int | None:
    """The longest text, in tokens, that a model has positions for; None where it has no such limit.

    RoBERTa and its kin count positions from the padding token's number + 1, which is the table's
    padding_idx; BART and OPT leave out the first rows, as the table's offset says. What code of
    somebody's own does is not known: then what fits in either way is taken, with one line in the
    log.

    Args:
        name: of the checkpoint.
        model: a Hugging Face model or a ModularReranker.

    Raises:
        ValueError: config.json gives something else than a number.
    """
    model = model.encoder if isinstance(model, ModularReranker) else model
    config = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and not isinstance(limit, int):
        raise ValueError(
            f"{name}/config.json: expected max_position_embeddings to be a number, got "
            f"{shown(limit)}"
        )
    tables = [
        part
        for path, part in model.base_model.named_modules()
        if path.rpartition(".")[2] in _TABLES
        and isinstance(getattr(part, "weight", None), nn.Parameter)
    ]
    limits = [limit] if limit and limit > 0 else []
    for table in tables:
        padding = getattr(table, "padding_idx", None)
        rows = int(table.weight.shape[0])
        fits = rows - (getattr(table, "offset", 0) if padding is None else padding + 1)
        if padding is None and not type(model).__module__.startswith("transformers.models."):
            fits = rows - (getattr(config, "pad_token_id", None) or 0) - 1
            logger.warning(
                "%s: of its %d positions %d are used, which surely fit its own code.",
                name,
                rows,
                fits,
            )
        limits.append(fits)
    return min(limits, default=None)

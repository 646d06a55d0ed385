"""MTEB's CrossEncoderProtocol: `mteb.evaluate(MTEBCrossEncoder("my-reranker"), tasks)`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models.model_meta import ModelMeta
from torch import nn

from rerank_fast.model.card import hub_id
from rerank_fast.model.cross_encoder import CrossEncoder


class MTEBCrossEncoder:
    """A reranker in MTEB's tasks: all pairs of a task in one stream, scored without an activation.

    Args:
        model: a CrossEncoder, or the path or hub id of one.
        revision: of a hub id.
        device: of a model that is opened here.
        options: of CrossEncoder for a model that is opened here.
    """

    def __init__(
        self,
        model: CrossEncoder | str | Path,
        revision: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, CrossEncoder):
            model = CrossEncoder(model, revision=revision, device=device, **options)
        self.model = model
        name = hub_id(model.name_or_path) or f"local/{Path(model.name_or_path).resolve().name}"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                "loader": MTEBCrossEncoder,
                "model_type": ["cross-encoder"],
            }
        )

    def predict(
        self,
        inputs1: Iterable[dict[str, Any]],
        inputs2: Iterable[dict[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """(N,) fp32 raw scores of the queries in inputs1 with the documents in inputs2, batches of
        texts.

        The batches are MTEB's; batch_size is the most pairs per forward pass. Nothing else of a
        task is read.
        """
        queries, documents = (
            [text for batch in batches for text in batch["text"]] for batches in (inputs1, inputs2)
        )
        scores: np.ndarray = self.model.predict(
            zip(queries, documents, strict=True),
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=nn.Identity(),
        )
        return scores

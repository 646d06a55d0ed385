"""EuroBERT: an encoder built of a decoder's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rerank_fast.model.modular.pooling import pool_by
from rerank_fast.model.packed.architectures.decoders import decoder_body, decoder_layer
from rerank_fast.model.packed.architectures.views import Body, HeadParts, Reading
from rerank_fast.model.packed.heads import DenseHead


def eurobert_body(base: Any) -> Body:
    layers = base.layers[: base.config.num_hidden_layers]
    return replace(
        decoder_body(base),
        layers=[decoder_layer(one, causal=False, window=None) for one in layers],
    )


def eurobert_reading(model: Any) -> Reading | None:
    """The first token, the mean of all, or (late) the mean of all tokens' scores."""

    def through_head(rows: Tensor) -> Tensor:
        return model.classifier(model.activation(model.dense(rows)))

    pooling, mean = model.classifier_pooling, pool_by(["mean"])
    if pooling == "late":

        def score_all(rows: Tensor, ends: Tensor, owner: Tensor) -> Tensor:
            return mean(through_head(rows.to(model.classifier.weight.dtype)), ends, owner)

        return Reading(head=lambda scores: scores.squeeze(1), pool=score_all)
    if pooling not in ("bos", "mean"):
        return None
    called = (None, model.dense, model.activation, nn.Dropout(0.0), model.classifier)
    return Reading(
        head=DenseHead(lambda rows: through_head(rows).squeeze(1), *called, drops_input=False),
        pool=mean if pooling == "mean" else None,
        parts=HeadParts(
            pooling="cls" if pooling == "bos" else "mean",
            dense=model.dense,
            activation=model.activation,
            out=model.classifier,
        ),
    )

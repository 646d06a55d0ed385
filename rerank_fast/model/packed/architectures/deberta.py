"""DeBERTa-v2 and v3: attention with two terms by the distance of query and key."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from rerank_fast.model.packed.architectures.views import (
    Body,
    HeadParts,
    PostNormLayer,
    Reading,
    RelativeTerms,
)
from rerank_fast.model.packed.heads import DenseHead


def deberta_body(base: Any) -> Body | str:
    """The parts of the encoder, or why they can't be packed."""
    encoder = base.encoder
    if encoder.conv is not None:
        return "a convolution over neighbouring tokens follows the first layer"
    if base.z_steps > 1:
        return "the last layer runs more than once"

    def embed(rows: Tensor, types: Tensor, positions: Tensor) -> Tensor:
        return base.embeddings(inputs_embeds=rows, token_type_ids=types, position_ids=positions)

    return Body(
        word_embeddings=base.embeddings.word_embeddings,
        embed=embed,
        layers=[_layer(layer, encoder) for layer in encoder.layer],
    )


def _layer(layer: Any, encoder: Any) -> PostNormLayer:
    attention = layer.attention.self
    terms = [term for term in ("c2p", "p2c") if term in attention.pos_att_type]
    return PostNormLayer(
        query=attention.query_proj,
        key=attention.key_proj,
        value=attention.value_proj,
        attention_dropout=attention.dropout,
        num_heads=attention.num_attention_heads,
        scale=_scale(attention.attention_head_size * (1 + len(terms))),
        attention_out=layer.attention.output.dense,
        attention_out_dropout=layer.attention.output.dropout,
        attention_norm=layer.attention.output.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        down_dropout=layer.output.dropout,
        output_norm=layer.output.LayerNorm,
        relative=_relative(attention, encoder, terms) if attention.relative_attention else None,
    )


def _scale(size: int) -> float:
    """One by the root of the head size times the kinds of products, as the model rounds it."""
    return 1 / float(torch.tensor(size, dtype=torch.float32).sqrt())


def _relative(attention: Any, encoder: Any, terms: list[str]) -> RelativeTerms | None:
    """v3's projections of the embeddings are those of the words, v2's are its own."""
    if not terms:
        return None
    shared = attention.share_att_key
    key = query = None
    if "c2p" in terms:
        key = attention.key_proj if shared else attention.pos_key_proj
    if "p2c" in terms:
        query = attention.query_proj if shared else attention.pos_query_proj
    return RelativeTerms(
        slots=functools.partial(
            _slots, attention.position_buckets, attention.max_relative_positions
        ),
        embeddings=encoder.rel_embeddings,
        norm=encoder.LayerNorm if "layer_norm" in encoder.norm_rel_ebd else None,
        dropout=attention.pos_dropout,
        key=key,
        query=query,
    )


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: a step with gradients must be able to save it
def _slots(buckets: int, farthest: int, device: torch.device) -> Tensor:
    """The row of the embeddings for every distance of a query and a key up to the farthest that is
    told apart, int32; distances beyond half the buckets share them by their logarithm.

    The same row serves position to content: it is chosen by the distance from key to query, turned
    round once more.
    """
    distance = torch.arange(-farthest, farthest + 1)
    span = farthest
    if buckets > 0:
        span, middle = buckets, buckets // 2
        # In fp32 and in this order, as the model rounds it: a bucket's bound is a rounded number.
        far = torch.where(distance.abs() < middle, torch.tensor(middle - 1), distance.abs())
        ratio = torch.log(far / middle) / torch.log(torch.tensor((farthest - 1) / middle))
        log_bucket = torch.ceil(ratio * (middle - 1)) + middle
        distance = torch.where(
            far <= middle, distance.to(log_bucket.dtype), log_bucket * distance.sign()
        ).long()
    return (distance + span).clamp(0, 2 * span - 1).int().to(device)


def deberta_reading(model: Any) -> Reading:
    """Pooler (dropout, dense, activation) of the first token, dropout, classifier."""
    pooler = model.pooler

    def through_pooler(first: Tensor) -> Tensor:
        return model.classifier(model.dropout(pooler(first[:, None]))).squeeze(1)

    activation = ACT2FN[pooler.config.pooler_hidden_act]
    parts = HeadParts(
        pooling="cls",
        dropout_in=pooler.dropout.p,
        dense=pooler.dense,
        activation=activation,
        dropout=model.dropout.p,
        out=model.classifier,
    )
    called = (pooler, pooler.dense, activation, model.dropout, model.classifier)
    own = pooler.dropout.p > 0  # before the dense layer, and of another rate than after it
    head = through_pooler if own else DenseHead(through_pooler, *called, drops_input=False)
    return Reading(head=head, parts=parts)

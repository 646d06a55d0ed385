"""T5 and mT5: an encoder whose layers add one bias by distance, and a decoder that answers with one
token.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rerank_fast.model.packed.architectures.views import (
    Body,
    CrossAttention,
    Decoder,
    PreNormLayer,
    RelativeTerms,
)

# Answered by the first token of the decoder: rerankers as monoT5 is one.
ENCODER_DECODERS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")


def t5_encoder_body(base: Any) -> Body:
    """The encoder alone."""
    stack = base.encoder
    return Body(
        word_embeddings=base.shared,
        embed=lambda rows, types, positions: stack.dropout(rows),
        layers=_layers(stack),
        final_norm=stack.final_layer_norm,
        final_dropout=stack.dropout,
    )


def t5_body(model: Any) -> Body | str:
    """Encoder and decoder, or why they can't be packed."""
    encoder, decoder, rows = model.encoder, model.decoder, model.shared.weight
    if encoder.embed_tokens.weight is not rows or decoder.embed_tokens.weight is not rows:
        return "encoder and decoder have word embeddings of their own"
    return replace(
        t5_encoder_body(model),
        decoder=Decoder(
            start_token_id=start_token_id(model),
            embed=decoder.dropout,
            layers=_layers(decoder),
            final_norm=decoder.final_layer_norm,
            final_dropout=decoder.dropout,
        ),
    )


def start_token_id(model: Any) -> int:
    """The token that an encoder-decoder begins its answer with."""
    config, generation = model.config, getattr(model, "generation_config", None)
    known = [getattr(one, "decoder_start_token_id", None) for one in (config, generation)]
    return int(next((one for one in (*known, config.pad_token_id) if one is not None), 0))


def answer_scale(model: Any) -> float:
    """What the last hidden states are multiplied with before the vocabulary."""
    scaled = getattr(model.config, "scale_decoder_outputs", False)  # mT5 never does it
    return float(model.config.d_model**-0.5) if scaled else 1.0


def _layers(stack: Any) -> list[PreNormLayer]:
    first = stack.block[0].layer[0].SelfAttention
    slots = functools.partial(
        _slots,
        type(first)._relative_position_bucket,
        not stack.is_decoder,
        first.relative_attention_num_buckets,
        first.relative_attention_max_distance,
    )
    terms = RelativeTerms(slots=slots, embeddings=first.relative_attention_bias)
    return [_layer(block.layer, terms) for block in stack.block]


def _layer(sublayers: Any, terms: RelativeTerms) -> PreNormLayer:
    own, *between, last = sublayers
    attention, dense = own.SelfAttention, last.DenseReluDense
    gated = hasattr(dense, "wi_0")
    return PreNormLayer(
        attention_norm=own.layer_norm,
        projections=[attention.q, attention.k, attention.v],
        num_heads=attention.n_heads,
        num_key_value_heads=attention.n_heads,
        head_size=attention.key_value_proj_dim,
        scale=1.0,
        query_norm=None,
        key_norm=None,
        rotary=None,
        causal=False,  # a decoder's one token sees itself
        window=None,
        attention=attention,
        attention_dropout=attention.dropout,
        attention_out=attention.o,
        attention_out_dropout=own.dropout,
        mlp_norm=last.layer_norm,
        gate_up=[dense.wi_0, dense.wi_1] if gated else [dense.wi],
        activation=dense.act,
        mlp_dropout=dense.dropout,
        down=dense.wo,
        down_dropout=last.dropout,
        gated=gated,
        relative=terms,
        cross=_cross(between[0]) if between else None,
    )


def _cross(sublayer: Any) -> CrossAttention:
    attention = sublayer.EncDecAttention
    return CrossAttention(
        norm=sublayer.layer_norm,
        query=attention.q,
        keys_values=[attention.k, attention.v],
        attention=attention,
        attention_dropout=attention.dropout,
        out=attention.o,
        out_dropout=sublayer.dropout,
    )


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: a step with gradients must be able to save it
def _slots(
    bucket: Any, both_ways: bool, buckets: int, farthest: int, device: torch.device
) -> Tensor:
    """The row of the bias for every distance of a query and a key, int32, as the model counts: the
    key's place less the query's.
    """
    reach = max(farthest, buckets)
    distance = torch.arange(-reach, reach + 1)
    found = bucket(-distance, bidirectional=both_ways, num_buckets=buckets, max_distance=farthest)
    return found.int().to(device)

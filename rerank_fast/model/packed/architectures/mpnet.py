"""MPNet: BERT's layers with one bias by the distance of query and key, which all of them add."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rerank_fast.model.packed.architectures.views import Body, PostNormLayer, RelativeTerms

# The model calls its buckets with these whatever its config says; from the second on all distances
# share one.
_BUCKETS, _FARTHEST = 32, 128


def mpnet_body(base: Any) -> Body | str:
    """The parts of the encoder, or why they can't be packed."""
    encoder = base.encoder
    if encoder.relative_attention_bias.num_embeddings < _BUCKETS:
        rows = encoder.relative_attention_bias.num_embeddings
        return f"the relative bias has {rows} rows, of which distances name {_BUCKETS}"
    terms = RelativeTerms(
        slots=functools.partial(_slots, type(encoder).relative_position_bucket),
        embeddings=encoder.relative_attention_bias,
    )
    return Body(
        word_embeddings=base.embeddings.word_embeddings,
        embed=lambda rows, types, positions: base.embeddings(
            inputs_embeds=rows, position_ids=positions
        ),
        pad_position=base.embeddings.padding_idx,
        layers=[_layer(layer, terms) for layer in encoder.layer],
    )


def _layer(layer: Any, terms: RelativeTerms) -> PostNormLayer:
    attention = layer.attention.attn
    return PostNormLayer(
        query=attention.q,
        key=attention.k,
        value=attention.v,
        attention_dropout=attention.dropout,
        num_heads=attention.num_attention_heads,
        scale=attention.attention_head_size**-0.5,
        attention_out=attention.o,
        attention_out_dropout=layer.attention.dropout,
        attention_norm=layer.attention.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        down_dropout=layer.output.dropout,
        output_norm=layer.output.LayerNorm,
        relative=terms,
    )


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: a step with gradients must be able to save it
def _slots(bucket: Any, device: torch.device) -> Tensor:
    """The row of the bias for every distance of a query and a key, int32, as the model counts: the
    key's place less the query's.
    """
    distance = torch.arange(-_FARTHEST, _FARTHEST + 1)
    return bucket(-distance, num_buckets=_BUCKETS).int().to(device)

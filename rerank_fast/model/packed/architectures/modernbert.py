"""ModernBERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rerank_fast.model.modular.pooling import pool_by
from rerank_fast.model.packed.architectures.decoders import flat
from rerank_fast.model.packed.architectures.views import Body, HeadParts, PreNormLayer, Reading


def modernbert_body(base: Any) -> Body:
    def rotary(hidden: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            kind: flat(base.rotary_emb(hidden, positions, kind))
            for kind in set(base.config.layer_types)
        }

    return Body(
        word_embeddings=base.embeddings.tok_embeddings,
        embed=lambda rows, types, positions: base.embeddings(inputs_embeds=rows),
        layers=[_modernbert_layer(layer, base.config) for layer in base.layers],
        final_norm=base.final_norm,
        rotary=rotary,
    )


def _modernbert_layer(layer: Any, config: Any) -> PreNormLayer:
    attention, heads = layer.attn, config.num_attention_heads
    reach = config.sliding_window if layer.attention_type == "sliding_attention" else None
    return PreNormLayer(
        attention_norm=None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm,
        projections=[attention.Wqkv],
        num_heads=heads,
        num_key_value_heads=heads,
        head_size=attention.head_dim,
        scale=attention.head_dim**-0.5,
        query_norm=None,
        key_norm=None,
        rotary=layer.attention_type,
        causal=False,
        window=None if reach is None else (reach, reach),
        attention=attention,
        attention_dropout=attention.attention_dropout,
        attention_out=attention.Wo,
        attention_out_dropout=attention.out_drop,
        mlp_norm=layer.mlp_norm,
        gate_up=[layer.mlp.Wi],
        activation=layer.mlp.act,
        mlp_dropout=layer.mlp.drop,
        down=layer.mlp.Wo,
    )


def modernbert_reading(model: Any) -> Reading:
    parts = HeadParts(
        pooling=model.config.classifier_pooling,
        dense=model.head.dense,
        activation=model.head.act,
        norm=model.head.norm,
        dropout=model.drop.p,
        out=model.classifier,
    )
    return Reading(
        parts=parts,
        head=lambda pooled: model.classifier(model.drop(model.head(pooled))).squeeze(1),
        pool=None if model.config.classifier_pooling == "cls" else pool_by(["mean"]),
    )

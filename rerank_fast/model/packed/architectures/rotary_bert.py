"""BERT's order of norms with rotary positions: NomicBERT, GTE and Jina's XLM-RoBERTa."""

from __future__ import annotations

from typing import Any

from rerank_fast.model.packed.architectures.decoders import flat
from rerank_fast.model.packed.architectures.views import Body, PostNormLayer


def rotary_bert_body(base: Any) -> Body:
    config = base.config
    return Body(
        word_embeddings=base.embeddings.word_embeddings,
        embed=lambda rows, types, positions: base.embeddings(
            inputs_embeds=rows, token_type_ids=types, position_ids=positions
        ),
        layers=[_layer(layer, config) for layer in base.layers[: config.num_hidden_layers]],
        rotary=lambda hidden, positions: {"all": flat(base.rotary_emb(hidden, positions))},
    )


def _layer(layer: Any, config: Any) -> PostNormLayer:
    attention, mlp = layer.self_attn, layer.mlp
    gated = hasattr(mlp, "gate_proj")
    return PostNormLayer(
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        attention_dropout=attention,
        attention_dropout_p=attention.attention_dropout,
        num_heads=config.num_attention_heads,
        scale=attention.scaling,
        rotary="all",
        attention_out=attention.o_proj,
        attention_out_dropout=layer.post_attention_dropout,
        attention_norm=layer.post_attention_layernorm,
        gate=mlp.gate_proj if gated else None,
        up=mlp.up_proj if gated else mlp.fc1,
        activation=mlp.act_fn if gated else mlp.activation_fn,
        mlp_dropout=getattr(mlp, "dropout", None),
        down=mlp.down_proj if gated else mlp.fc2,
        down_dropout=layer.post_mlp_dropout,
        output_norm=layer.post_mlp_layernorm,
    )

"""What was made of RoBERTa: XMOD's adapters for languages, and RoBERTa with norms before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rerank_fast.model.packed.architectures.bert import bert_body
from rerank_fast.model.packed.architectures.views import (
    Adapter,
    Body,
    PostNormLayer,
    PreNormLayer,
)

_roberta_body = bert_body(pad_positions=True)


def xmod_body(base: Any) -> Body | str | None:
    """With the adapters of the default language, which a call without lang_ids takes."""
    config, body = base.config, _roberta_body(base)
    if body is None or config.default_language is None:
        return "config.json names no default_language"
    if config.pre_norm or not config.ln_before_adapter:
        return "layers norm in another order than those of the published X-MOD models"
    if not (config.adapter_layer_norm or config.adapter_reuse_layer_norm):
        return "adapters read rows that are not normed"

    def adapted(view: Any, layer: Any) -> PostNormLayer:
        output = layer.output
        adapter = output.adapter_modules[config.default_language]
        norm = output.adapter_layer_norm
        return replace(
            view,
            adapter=Adapter(
                norm=output.LayerNorm if norm is None else norm,
                down=adapter.dense1,
                activation=adapter.adapter_act_fn,
                up=adapter.dense2,
            ),
        )

    pairs = zip(body.layers, base.encoder.layer, strict=True)
    return replace(body, layers=[adapted(view, layer) for view, layer in pairs])


def roberta_prelayernorm_body(base: Any) -> Body | None:
    if base.config.is_decoder or base.config.add_cross_attention:
        return None
    return Body(
        word_embeddings=base.embeddings.word_embeddings,
        embed=lambda rows, types, positions: base.embeddings(
            inputs_embeds=rows, token_type_ids=types, position_ids=positions
        ),
        embeddings=base.embeddings,
        pad_position=base.embeddings.padding_idx,
        layers=[_pre_norm_layer(layer) for layer in base.encoder.layer],
        final_norm=base.LayerNorm,
    )


def _pre_norm_layer(layer: Any) -> PreNormLayer:
    attention = layer.attention.self
    return PreNormLayer(
        attention_norm=layer.attention.LayerNorm,
        projections=[attention.query, attention.key, attention.value],
        num_heads=attention.num_attention_heads,
        num_key_value_heads=attention.num_attention_heads,
        head_size=attention.attention_head_size,
        scale=attention.scaling,
        query_norm=None,
        key_norm=None,
        rotary=None,
        causal=False,
        window=None,
        attention=attention.dropout,
        attention_dropout=attention.dropout.p,
        attention_out=layer.attention.output.dense,
        attention_out_dropout=layer.attention.output.dropout,
        mlp_norm=layer.intermediate.LayerNorm,
        gate_up=[layer.intermediate.dense],
        gated=False,
        activation=layer.intermediate.intermediate_act_fn,
        mlp_dropout=None,
        down=layer.output.dense,
        down_dropout=layer.output.dropout,
    )

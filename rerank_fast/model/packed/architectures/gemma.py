"""Gemma: embeddings multiplied by a number, norms by 1 + weight, and from Gemma 2 on norms around
each sublayer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from rerank_fast.model.packed.architectures.decoders import (
    decoder_body,
    decoder_layer,
    flat,
    window_of,
)
from rerank_fast.model.packed.architectures.views import Body, PreNormLayer


def gemma_body(base: Any) -> Body | str:
    config = base.config
    if getattr(config, "use_bidirectional_attention", None) and getattr(config, "is_causal", True):
        # transformers' mask ignores it. It holds where there is none: in kernels of Gemma where a
        # batch has no padding, in eager attention, which is Gemma 2's, never.
        return "it depends on the kernel whether transformers heeds use_bidirectional_attention"
    return replace(decoder_body(base), embed=_scaled(base.embed_tokens))


def gemma2_body(base: Any) -> Body | str:
    """Windows in every other layer, and attention that caps its logits."""
    body = gemma_body(base)
    if isinstance(body, str):
        return body
    softcap = base.config.attn_logit_softcapping
    layers = [
        replace(_normed_around(found, one), softcap=softcap)
        for found, one in zip(body.layers, base.layers, strict=False)
    ]
    return replace(body, layers=layers)


def gemma3_body(base: Any) -> Body:
    """The model of texts, causal or not."""
    config = base.config
    causal, both = getattr(config, "is_causal", True), bool(config.use_bidirectional_attention)

    def layer(one: Any, kind: str) -> PreNormLayer:
        window, reach = None, config.sliding_window
        if kind == "sliding_attention":
            # Its own mask for both directions leaves the token at this distance out.
            window = (reach - 1, reach - 1) if both and causal else window_of(reach, causal=causal)
        found = decoder_layer(one, causal=causal and not both, window=window)
        return replace(_normed_around(found, one), rotary=kind)

    def rotary(hidden: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        kinds = set(config.layer_types)
        return {kind: flat(base.rotary_emb(hidden, positions, kind)) for kind in kinds}

    layers = base.layers[: config.num_hidden_layers]
    return Body(
        word_embeddings=base.embed_tokens,
        embed=_scaled(base.embed_tokens),
        layers=[layer(one, kind) for one, kind in zip(layers, config.layer_types, strict=False)],
        final_norm=base.norm,
        rotary=rotary,
    )


def _normed_around(found: Any, layer: Any) -> PreNormLayer:
    """A layer's parts, with the norms of what its sublayers add."""
    return replace(
        found,
        post_attention_norm=layer.post_attention_layernorm,
        mlp_norm=layer.pre_feedforward_layernorm,
        post_mlp_norm=layer.post_feedforward_layernorm,
    )


def _scaled(table: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As the table scales its rows: by a number that is rounded to the weights' dtype."""
    return lambda rows, types, positions: rows * table.embed_scale.to(rows.dtype)

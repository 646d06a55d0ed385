"""Gemma: embeddings multiplied by a number, norms by 1 + weight, and Gemma 3's norms around each
sublayer.
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
        # transformers' mask ignores it, and it holds where a batch needs no mask.
        return "use_bidirectional_attention makes scores depend on whether a batch has padding"
    return replace(decoder_body(base), embed=_scaled(base.embed_tokens))


def gemma2_body(base: Any) -> str:
    return "attention caps its logits, for which there is no kernel"


def gemma3_body(base: Any) -> Body:
    """The model of texts, causal or not."""
    config = base.config
    causal, both = getattr(config, "is_causal", True), bool(config.use_bidirectional_attention)

    def layer(one: Any, kind: str) -> PreNormLayer:
        window, reach = None, config.sliding_window
        if kind == "sliding_attention":
            # Its own mask for both directions leaves the token at this distance out.
            window = (reach - 1, reach - 1) if both and causal else window_of(reach, causal=causal)
        return replace(
            decoder_layer(one, causal=causal and not both, window=window),
            rotary=kind,
            post_attention_norm=one.post_attention_layernorm,
            mlp_norm=one.pre_feedforward_layernorm,
            post_mlp_norm=one.post_feedforward_layernorm,
        )

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


def _scaled(table: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As the table scales its rows: by a number that is rounded to the weights' dtype."""
    return lambda rows, types, positions: rows * table.embed_scale.to(rows.dtype)

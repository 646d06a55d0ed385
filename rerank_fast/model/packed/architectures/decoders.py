"""Llama, Mistral and Qwen: read at their last token, by a classifier or by the logits of their
answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_fast.model.packed.architectures.t5 import ENCODER_DECODERS, answer_scale
from rerank_fast.model.packed.architectures.views import (
    Body,
    HeadParts,
    PreNormLayer,
    Reading,
)
from rerank_fast.model.packed.heads import AnswerHead, Answers, own_class

# Their logits are the last hidden states times the vocabulary and, but for a cap, nothing else.
CAUSAL_FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
# Whose config may say that they are capped.
_CAPPED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")


def decoder_body(base: Any) -> Body:
    """Llama, Qwen2 and Qwen3. A config whose is_causal is false lets tokens attend to all, in
    every decoder of transformers.
    """
    causal = getattr(base.config, "is_causal", True)

    def layer(one: Any) -> PreNormLayer:
        reach = getattr(one.self_attn, "sliding_window", None)
        return decoder_layer(one, causal=causal, window=window_of(reach, causal=causal))

    return Body(
        word_embeddings=base.embed_tokens,
        embed=lambda rows, types, positions: rows,
        layers=[layer(one) for one in base.layers[: base.config.num_hidden_layers]],
        final_norm=base.norm,
        rotary=lambda hidden, positions: {"all": flat(base.rotary_emb(hidden, positions))},
    )


def window_of(reach: int | None, *, causal: bool) -> tuple[int, int] | None:
    """How far tokens see to the left and to the right, as transformers' masks have it: causal ones
    count the token itself.
    """
    if reach is None:
        return None
    return (reach - 1, 0) if causal else (reach, reach)


def mistral_body(base: Any) -> Body:
    causal, reach = getattr(base.config, "is_causal", True), base.config.sliding_window
    window = window_of(reach, causal=causal)
    layers = base.layers[: base.config.num_hidden_layers]
    return replace(
        decoder_body(base),
        layers=[decoder_layer(one, causal=causal, window=window) for one in layers],
    )


def decoder_layer(layer: Any, *, causal: bool, window: tuple[int, int] | None) -> PreNormLayer:
    attention = layer.self_attn
    return PreNormLayer(
        attention_norm=layer.input_layernorm,
        projections=[attention.q_proj, attention.k_proj, attention.v_proj],
        num_heads=attention.config.num_attention_heads,
        num_key_value_heads=attention.config.num_key_value_heads,
        head_size=attention.head_dim,
        scale=attention.scaling,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        rotary="all",
        causal=causal,
        window=window,
        attention=attention,
        attention_dropout=attention.attention_dropout,
        attention_out=attention.o_proj,
        attention_out_dropout=None,
        mlp_norm=layer.post_attention_layernorm,
        gate_up=[layer.mlp.gate_proj, layer.mlp.up_proj],
        activation=layer.mlp.act_fn,
        mlp_dropout=None,
        down=layer.mlp.down_proj,
    )


def flat(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = rotary
    return cos[0], sin[0]


def decoder_reading(model: Any) -> Reading | None:
    """A score for the last token that is not padding."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return None
    return Reading(
        head=lambda last: model.score(last).squeeze(1),
        reads="last",
        unread_token_id=model.config.pad_token_id,
        parts=HeadParts(pooling="lasttoken", out=model.score),
    )


def find_answer_head(model: Any, answers: Answers) -> AnswerHead | None:
    """The head of a language model whose score is the last hidden state times the vocabulary, and
    capped where the model's is; None for another.
    """
    vocabulary, name = model.get_output_embeddings(), own_class(model).__name__
    if name not in (*CAUSAL_FAMILIES, *ENCODER_DECODERS) or type(vocabulary) is not nn.Linear:
        return None
    if (
        not own_class(model).__module__.startswith("transformers.models.")
        or vocabulary._forward_hooks
    ):
        return None
    ids = [answers.true_token_id] + (
        [] if answers.false_token_id is None else [answers.false_token_id]
    )
    rows = F.embedding(torch.tensor(ids, device=vocabulary.weight.device), vocabulary.weight)
    if name in ENCODER_DECODERS:
        rows = rows * answer_scale(model)
    bias = None if vocabulary.bias is None else vocabulary.bias[ids]
    softcap = model.config.final_logit_softcapping if name in _CAPPED else None
    return AnswerHead(rows, bias, softcap)

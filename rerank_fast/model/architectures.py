"""Which Hugging Face models run packed, and where their parts are: views, nothing is changed in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from torch import Tensor, nn

from rerank_fast.model.heads import CAUSAL_FAMILIES, Answers, Head, find_answer_head, find_head, own_class
from rerank_fast.model.linear import must_be_called


@dataclass(frozen=True)
class PostNormLayer:
    """A layer as BERT has it: attention, add and norm, feed-forward, add and norm."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Dropout
    num_heads: int
    scale: float
    attention_out: nn.Module
    attention_out_dropout: nn.Dropout | None
    attention_norm: nn.LayerNorm
    up: nn.Module
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    down_dropout: nn.Dropout | None
    output_norm: nn.LayerNorm


@dataclass(frozen=True)
class PreNormLayer:
    """A layer as ModernBERT, Llama and Qwen have it: norm, attention, add; norm, gated feed-forward, add."""

    attention_norm: nn.Module | None
    projections: list[nn.Module]  # query, key and value, or one for all three
    num_heads: int
    num_key_value_heads: int
    head_size: int
    scale: float
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    rotary: str
    causal: bool
    window: tuple[int, int] | None
    attention: nn.Module  # says whether it is training
    attention_dropout: float
    attention_out: nn.Module
    attention_out_dropout: nn.Module | None
    mlp_norm: nn.Module
    gate_up: list[nn.Module]  # the gate and what it is multiplied with, or one for both
    activation: Callable[[Tensor], Tensor]
    mlp_dropout: nn.Module | None
    down: nn.Module


Rotary = Callable[[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Architecture:
    """The parts of a reranker that runs packed."""

    word_embeddings: nn.Embedding
    embed: Callable[[Tensor, Tensor, Tensor], Tensor]  # word rows, token types, positions, all (1, T) -> (1, T, H)
    layers: Sequence[PostNormLayer | PreNormLayer]
    head: Head
    reads: Literal["first", "last", "mean"] = "first"  # the token, or all, that the head sees
    final_norm: nn.Module | None = None
    rotary: Rotary | None = None  # hidden states and positions -> cosines and sines by name
    pad_position: int | None = None  # RoBERTa and its kin count positions from here + 1, a padding token has this
    unread_token_id: int | None = None  # the last token is the last that is not this one
    embeddings: nn.Module | None = None  # all that embed calls, where that is one module


def find_architecture(model: nn.Module, answers: Answers | None = None) -> Architecture | None:
    """The parts of a model that runs packed; None for one that must be padded.

    answers are those of a causal language model.
    """
    try:
        found = _find(model, answers)
    except AttributeError:
        return None  # reason_to_pad says what is missing
    return None if found is None or _unknown_part(model, found) else found


def _find(model: Any, answers: Answers | None) -> Architecture | None:
    if answers is not None:
        head = find_answer_head(model, answers)
        return None if head is None else _decoder_parts(model, head)
    kind = own_class(model)
    find = _FAMILIES.get(kind.__name__)
    if find is None or not kind.__module__.startswith("transformers.models."):
        return None  # remote code may look like BERT and do something else
    return find(model)


def reason_to_pad(model: nn.Module, answers: Answers | None = None) -> str:
    """Why find_architecture gave None."""
    name = own_class(model).__name__
    if name not in (*_FAMILIES, *CAUSAL_FAMILIES):
        return f"packed execution knows {', '.join([*_FAMILIES, *CAUSAL_FAMILIES])}, not {name}"
    try:
        found = _find(model, answers)
    except AttributeError as error:  # another transformers, or a module that was replaced
        return f"this {name} of transformers {transformers.__version__} lacks what packed execution reads: {error}"
    if found is None:
        return f"this {name} has parts that packed execution does not know"
    return f"of this {name}, {_unknown_part(model, found)}"


def _unknown_part(model: Any, found: Architecture) -> str:
    """What a call of the model would do and packed execution would not; empty where there is nothing.

    It calls linear layers, activations, the embeddings around the words, and the head. The other modules it passes
    over, or reads their weights: they must be what their library made them, without hooks.
    """
    base = model.base_model
    heads = [part for part in (*model.children(), getattr(base, "pooler", None)) if part not in (None, base)]
    others = (getattr(base, name, None) for name in ("embeddings", "embeddings_project", "rotary_emb"))
    called = {part for one in (*heads, *others, *_called(found)) if one is not None for part in one.modules()}
    called -= set(found.word_embeddings.modules())
    for name, module in model.named_modules():
        if module in called:
            continue
        kind, place = own_class(module), name or "the model"
        if not kind.__module__.startswith(("torch.nn.", "transformers.")):
            return f"{place} is a {kind.__module__}.{kind.__name__}, which must be called"
        sharded = kind is not type(module)  # by hooks
        if not sharded and must_be_called(module) and not _asks_for_gradients(module):
            return f"{place} has hooks or a forward of its own, which must run"
    dtypes = {found.word_embeddings.weight.dtype, *(weight.dtype for one in heads for weight in one.parameters())}
    if len(dtypes) > 1:
        return f"the word embeddings and the score head have weights of {' and '.join(sorted(map(str, dtypes)))}"
    return ""


def _asks_for_gradients(module: nn.Module) -> bool:
    """Whether all that hooks do is what transformers and PEFT want for gradient checkpointing."""
    others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    names = [getattr(hook, "__name__", "") for hook in module._forward_hooks.values()]
    return (
        all(name.startswith("make_inputs_require_grad") for name in names)
        and not any(others)
        and "forward" not in vars(module)
    )


def _called(found: Architecture) -> Iterator[nn.Module]:
    """What packed execution calls of the layers and after them."""
    for layer in found.layers:
        parts = [layer.attention_out, layer.activation, layer.down]
        if isinstance(layer, PostNormLayer):
            parts += [layer.query, layer.key, layer.value, layer.up]
        else:
            parts += [*layer.projections, *layer.gate_up, layer.query_norm, layer.key_norm]
            parts += [layer.attention_out_dropout, layer.mlp_dropout]
            parts += [one for one in (layer.attention_norm, layer.mlp_norm) if not isinstance(one, nn.LayerNorm)]
        yield from (part for part in parts if isinstance(part, nn.Module))
    if found.final_norm is not None and not isinstance(found.final_norm, nn.LayerNorm):
        yield found.final_norm


def _bert_like(base_name: str, pad_positions: bool) -> Callable[[Any], Architecture | None]:
    def find(model: Any) -> Architecture | None:
        base, config, head = getattr(model, base_name), model.config, find_head(model)
        if head is None or config.is_decoder or config.add_cross_attention:
            return None

        def embed(rows: Tensor, types: Tensor, positions: Tensor) -> Tensor:
            embedded = base.embeddings(inputs_embeds=rows, token_type_ids=types, position_ids=positions)
            # ELECTRA's small embeddings are widened to the hidden size.
            return base.embeddings_project(embedded) if hasattr(base, "embeddings_project") else embedded

        return Architecture(
            word_embeddings=base.embeddings.word_embeddings,
            embed=embed,
            embeddings=None if hasattr(base, "embeddings_project") else base.embeddings,
            pad_position=base.embeddings.padding_idx if pad_positions else None,
            layers=[_bert_layer(layer) for layer in base.encoder.layer],
            head=head,
        )

    return find


def _bert_layer(layer: Any) -> PostNormLayer:
    attention = layer.attention.self
    return PostNormLayer(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        attention_dropout=attention.dropout,
        num_heads=attention.num_attention_heads,
        scale=attention.scaling,
        attention_out=layer.attention.output.dense,
        attention_out_dropout=layer.attention.output.dropout,
        attention_norm=layer.attention.output.LayerNorm,
        up=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        down=layer.output.dense,
        down_dropout=layer.output.dropout,
        output_norm=layer.output.LayerNorm,
    )


def _distilbert(model: Any) -> Architecture | None:
    base, head = model.distilbert, find_head(model)
    if head is None:
        return None
    return Architecture(
        word_embeddings=base.embeddings.word_embeddings,
        embed=lambda rows, types, positions: base.embeddings(None, inputs_embeds=rows, position_ids=positions),
        layers=[_distilbert_layer(layer) for layer in base.transformer.layer],
        head=head,
    )


def _distilbert_layer(layer: Any) -> PostNormLayer:
    attention = layer.attention
    return PostNormLayer(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        attention_dropout=attention.dropout,
        num_heads=attention.n_heads,
        scale=attention.scaling,
        attention_out=attention.out_lin,
        attention_out_dropout=None,
        attention_norm=layer.sa_layer_norm,
        up=layer.ffn.lin1,
        activation=layer.ffn.activation,
        down=layer.ffn.lin2,
        down_dropout=layer.ffn.dropout,
        output_norm=layer.output_layer_norm,
    )


def _modernbert(model: Any) -> Architecture | None:
    base, config, head = model.model, model.config, find_head(model)
    if head is None:
        return None

    def rotary(hidden: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {kind: _flat(base.rotary_emb(hidden, positions, kind)) for kind in set(config.layer_types)}

    return Architecture(
        word_embeddings=base.embeddings.tok_embeddings,
        embed=lambda rows, types, positions: base.embeddings(inputs_embeds=rows),
        layers=[_modernbert_layer(layer, config) for layer in base.layers],
        head=head,
        reads="first" if config.classifier_pooling == "cls" else "mean",
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


def _decoder(model: Any) -> Architecture | None:
    """Llama and Qwen with a score for the last token that is not padding."""
    head = find_head(model)
    return None if head is None else _decoder_parts(model, head, unread_token_id=model.config.pad_token_id)


def _decoder_parts(model: Any, head: Head, unread_token_id: int | None = None) -> Architecture:
    base, config = model.model, model.config
    return Architecture(
        word_embeddings=base.embed_tokens,
        embed=lambda rows, types, positions: rows,
        layers=[_decoder_layer(layer) for layer in base.layers[: config.num_hidden_layers]],
        head=head,
        reads="last",
        final_norm=base.norm,
        rotary=lambda hidden, positions: {"all": _flat(base.rotary_emb(hidden, positions))},
        unread_token_id=unread_token_id,
    )


def _decoder_layer(layer: Any) -> PreNormLayer:
    attention = layer.self_attn
    reach = getattr(attention, "sliding_window", None)
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
        causal=True,
        window=None if reach is None else (reach - 1, 0),
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


def _flat(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = rotary
    return cos[0], sin[0]


_FAMILIES: dict[str, Callable[[Any], Architecture | None]] = {
    "BertForSequenceClassification": _bert_like("bert", pad_positions=False),
    "RobertaForSequenceClassification": _bert_like("roberta", pad_positions=True),
    "XLMRobertaForSequenceClassification": _bert_like("roberta", pad_positions=True),
    "CamembertForSequenceClassification": _bert_like("roberta", pad_positions=True),
    "ElectraForSequenceClassification": _bert_like("electra", pad_positions=False),
    "DistilBertForSequenceClassification": _distilbert,
    "ModernBertForSequenceClassification": _modernbert,
    "LlamaForSequenceClassification": _decoder,
    "Qwen2ForSequenceClassification": _decoder,
    "Qwen3ForSequenceClassification": _decoder,
}

"""Which Hugging Face models run packed, and where their parts are: views, nothing is changed in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rerank_fast.model.heads import Head, find_head


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
class Architecture:
    """The parts of a sequence-classification model that runs packed."""

    word_embeddings: nn.Embedding
    embed: Callable[[Tensor, Tensor, Tensor], Tensor]  # word rows, token types, positions, all (1, T) -> (1, T, H)
    pad_position: int | None  # RoBERTa and its kin count positions from here + 1, and give padding tokens this one
    layers: list[PostNormLayer]
    head: Head


def find_architecture(model: nn.Module) -> Architecture | None:
    """The parts of a model that runs packed; None for one that must be padded."""
    find = _FAMILIES.get(type(model).__name__)
    if find is None or not type(model).__module__.startswith("transformers.models."):
        return None  # remote code may look like BERT and do something else
    return find(model)


def reason_to_pad(model: nn.Module) -> str:
    """Why find_architecture gave None."""
    name = type(model).__name__
    if name in _FAMILIES:
        return f"this {name} has parts that packed execution does not know"
    return f"packed execution knows {', '.join(_FAMILIES)}, not {name}"


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
        pad_position=None,
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


_FAMILIES: dict[str, Callable[[Any], Architecture | None]] = {
    "BertForSequenceClassification": _bert_like("bert", pad_positions=False),
    "RobertaForSequenceClassification": _bert_like("roberta", pad_positions=True),
    "XLMRobertaForSequenceClassification": _bert_like("roberta", pad_positions=True),
    "CamembertForSequenceClassification": _bert_like("roberta", pad_positions=True),
    "ElectraForSequenceClassification": _bert_like("electra", pad_positions=False),
    "DistilBertForSequenceClassification": _distilbert,
}

"""BERT and its kin: RoBERTa, XLM-RoBERTa, CamemBERT, Data2Vec, ELECTRA and DistilBERT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rerank_fast.model.packed.architectures.views import Body, HeadParts, PostNormLayer, Reading
from rerank_fast.model.packed.heads import DenseHead
from rerank_fast.ops.score_head import Activation


def bert_body(*, pad_positions: bool) -> Callable[[Any], Body | None]:
    """Finds the parts of such an encoder; pad_positions: they are counted from the padding token's
    number on.
    """

    def find(base: Any) -> Body | None:
        if base.config.is_decoder or base.config.add_cross_attention:
            return None

        def embed(rows: Tensor, types: Tensor, positions: Tensor) -> Tensor:
            embedded = base.embeddings(
                inputs_embeds=rows, token_type_ids=types, position_ids=positions
            )
            # ELECTRA's small embeddings are widened to the hidden size.
            return (
                base.embeddings_project(embedded)
                if hasattr(base, "embeddings_project")
                else embedded
            )

        return Body(
            word_embeddings=base.embeddings.word_embeddings,
            embed=embed,
            embeddings=None if hasattr(base, "embeddings_project") else base.embeddings,
            pad_position=base.embeddings.padding_idx if pad_positions else None,
            layers=[bert_layer(layer) for layer in base.encoder.layer],
        )

    return find


def bert_layer(layer: Any) -> PostNormLayer:
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


_POOLERS = [
    f"transformers.models.{family}.modeling_{family}.{name}Pooler"
    for family, name in (("bert", "Bert"), ("nomic_bert", "NomicBert"), ("gte", "Gte"))
]


def bert_reading(model: Any) -> Reading | None:
    """Pooler, dropout, classifier."""
    pooler = model.base_model.pooler
    if pooler is None:
        return None

    def through_pooler(first: Tensor) -> Tensor:
        return model.classifier(model.dropout(model.base_model.pooler(first[:, None]))).squeeze(1)

    if _path(pooler) not in _POOLERS:
        return Reading(head=through_pooler)
    called = (pooler, pooler.dense, pooler.activation, model.dropout, model.classifier)
    parts = HeadParts(
        pooling="cls",
        dense=pooler.dense,
        activation=pooler.activation,
        dropout=model.dropout.p,
        out=model.classifier,
    )
    return Reading(head=DenseHead(through_pooler, *called, drops_input=False), parts=parts)


# Whose forward is dropout -> dense -> tanh (ELECTRA: `activation`) -> dropout -> out_proj.
_CLASSIFICATION_HEADS = [
    f"transformers.models.{module}.{name}ClassificationHead"
    for module, name in (
        ("roberta.modeling_roberta", "Roberta"),
        ("xlm_roberta.modeling_xlm_roberta", "XLMRoberta"),
        ("camembert.modeling_camembert", "Camembert"),
        ("electra.modeling_electra", "Electra"),
        ("data2vec.modeling_data2vec_text", "Data2VecText"),
        ("xmod.modeling_xmod", "Xmod"),
        ("roberta_prelayernorm.modeling_roberta_prelayernorm", "RobertaPreLayerNorm"),
        ("mpnet.modeling_mpnet", "MPNet"),
        ("jina_embeddings_v3.modeling_jina_embeddings_v3", "JinaEmbeddingsV3"),
    )
]


def roberta_reading(model: Any) -> Reading | None:
    """A classification head of its own, which reads the first token."""
    head: Any = model.classifier
    if not hasattr(head, "out_proj"):
        return None

    def through_classifier(first: Tensor) -> Tensor:
        return model.classifier(first[:, None]).squeeze(1)

    if _path(head) not in _CLASSIFICATION_HEADS:
        return Reading(head=through_classifier)
    activation: nn.Module | Activation = getattr(head, "activation", "tanh")
    called = (head, head.dense, activation, head.dropout, head.out_proj)
    parts = HeadParts(
        pooling="cls",
        dropout_in=head.dropout.p,
        dense=head.dense,
        activation=nn.Tanh() if isinstance(activation, str) else activation,
        dropout=head.dropout.p,
        out=head.out_proj,
    )
    return Reading(head=DenseHead(through_classifier, *called, drops_input=True), parts=parts)


def _path(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def distilbert_body(base: Any) -> Body:
    return Body(
        word_embeddings=base.embeddings.word_embeddings,
        embed=lambda rows, types, positions: base.embeddings(
            None, inputs_embeds=rows, position_ids=positions
        ),
        layers=[_distilbert_layer(layer) for layer in base.transformer.layer],
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


def distilbert_reading(model: Any) -> Reading:
    def through_pre_classifier(first: Tensor) -> Tensor:
        return model.classifier(model.dropout(model.pre_classifier(first).relu())).squeeze(1)

    rest = (model.dropout, model.classifier)
    head = DenseHead(
        through_pre_classifier, None, model.pre_classifier, "relu", *rest, drops_input=False
    )
    parts = HeadParts(
        pooling="cls",
        dense=model.pre_classifier,
        activation=nn.ReLU(),
        dropout=model.dropout.p,
        out=model.classifier,
    )
    return Reading(head=head, parts=parts)

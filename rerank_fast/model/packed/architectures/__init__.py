"""Which models run packed, and where their parts are; what a family is stands here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import transformers
from torch import nn

from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packed.architectures.bert import (
    bert_body,
    bert_reading,
    distilbert_body,
    distilbert_reading,
    roberta_reading,
)
from rerank_fast.model.packed.architectures.deberta import deberta_body, deberta_reading
from rerank_fast.model.packed.architectures.decoders import (
    CAUSAL_FAMILIES,
    decoder_body,
    decoder_reading,
    find_answer_head,
    mistral_body,
)
from rerank_fast.model.packed.architectures.eurobert import eurobert_body, eurobert_reading
from rerank_fast.model.packed.architectures.gemma import gemma2_body, gemma3_body, gemma_body
from rerank_fast.model.packed.architectures.modernbert import modernbert_body, modernbert_reading
from rerank_fast.model.packed.architectures.modular import modular_reading
from rerank_fast.model.packed.architectures.mpnet import mpnet_body
from rerank_fast.model.packed.architectures.roberta_kin import (
    roberta_prelayernorm_body,
    xmod_body,
)
from rerank_fast.model.packed.architectures.rotary_bert import rotary_bert_body
from rerank_fast.model.packed.architectures.t5 import (
    ENCODER_DECODERS,
    start_token_id,
    t5_body,
    t5_encoder_body,
)
from rerank_fast.model.packed.architectures.views import (
    Architecture,
    Body,
    CrossAttention,
    Decoder,
    HeadParts,
    PostNormLayer,
    PreNormLayer,
    Reading,
)
from rerank_fast.model.packed.heads import Answers, own_class
from rerank_fast.model.packed.hooks import must_be_called

__all__ = [
    "Architecture",
    "CrossAttention",
    "Decoder",
    "HeadParts",
    "PostNormLayer",
    "PreNormLayer",
    "find_answer_head",
    "find_architecture",
    "find_head_parts",
    "reason_to_pad",
    "start_token_id",
]

T = TypeVar("T")

# A finder gives None, or why, where a model has something that packed execution does not know.
_BODIES: dict[str, Callable[[Any], Body | str | None]] = {
    "BertModel": bert_body(pad_positions=False),
    "RobertaModel": bert_body(pad_positions=True),
    "XLMRobertaModel": bert_body(pad_positions=True),
    "CamembertModel": bert_body(pad_positions=True),
    "ElectraModel": bert_body(pad_positions=False),
    "DistilBertModel": distilbert_body,
    "DebertaV2Model": deberta_body,
    "MPNetModel": mpnet_body,
    "ModernBertModel": modernbert_body,
    "Data2VecTextModel": bert_body(pad_positions=True),
    "XmodModel": xmod_body,
    "RobertaPreLayerNormModel": roberta_prelayernorm_body,
    "NomicBertModel": rotary_bert_body,
    "GteModel": rotary_bert_body,
    "JinaEmbeddingsV3Model": rotary_bert_body,
    "EuroBertModel": eurobert_body,
    "LlamaModel": decoder_body,
    "MistralModel": mistral_body,
    "Qwen2Model": decoder_body,
    "Qwen3Model": decoder_body,
    "GemmaModel": gemma_body,
    "Gemma2Model": gemma2_body,
    "Gemma3TextModel": gemma3_body,
    "T5EncoderModel": t5_encoder_body,
    "MT5EncoderModel": t5_encoder_body,
    "T5ForConditionalGeneration": t5_body,
    "MT5ForConditionalGeneration": t5_body,
}

_READINGS: dict[str, Callable[[Any], Reading | str | None]] = {
    "BertForSequenceClassification": bert_reading,
    "RobertaForSequenceClassification": roberta_reading,
    "XLMRobertaForSequenceClassification": roberta_reading,
    "CamembertForSequenceClassification": roberta_reading,
    "ElectraForSequenceClassification": roberta_reading,
    "DistilBertForSequenceClassification": distilbert_reading,
    "DebertaV2ForSequenceClassification": deberta_reading,
    "MPNetForSequenceClassification": roberta_reading,
    "ModernBertForSequenceClassification": modernbert_reading,
    "Data2VecTextForSequenceClassification": roberta_reading,
    "XmodForSequenceClassification": roberta_reading,
    "RobertaPreLayerNormForSequenceClassification": roberta_reading,
    "NomicBertForSequenceClassification": bert_reading,
    "GteForSequenceClassification": bert_reading,
    "JinaEmbeddingsV3ForSequenceClassification": roberta_reading,
    "EuroBertForSequenceClassification": eurobert_reading,
    "LlamaForSequenceClassification": decoder_reading,
    "MistralForSequenceClassification": decoder_reading,
    "Qwen2ForSequenceClassification": decoder_reading,
    "Qwen3ForSequenceClassification": decoder_reading,
    "GemmaForSequenceClassification": decoder_reading,
    "Gemma2ForSequenceClassification": decoder_reading,
    "Gemma3TextForSequenceClassification": decoder_reading,
}


def find_architecture(model: nn.Module, answers: Answers | None = None) -> Architecture | None:
    """The parts of a model that runs packed; None for one that must be padded.

    answers are those of a causal language model.
    """
    found = _find(model, answers)
    return None if isinstance(found, str) else found


def reason_to_pad(model: nn.Module, answers: Answers | None = None) -> str:
    """Why find_architecture gave None."""
    found = _find(model, answers)
    return found if isinstance(found, str) else ""


def find_head_parts(model: nn.Module) -> HeadParts | None:
    """The layers of a sequence classifier's head; None of one that has more than these."""
    try:
        reading = _of_transformers(model, _READINGS)
    except AttributeError:
        return None
    return reading.parts if isinstance(reading, Reading) else None


def _find(model: Any, answers: Answers | None) -> Architecture | str:
    """The parts, or why they are not read."""
    name = own_class(model.base_model if isinstance(model, ModularReranker) else model).__name__
    try:
        reading = _reading(model, answers)
        body = None if isinstance(reading, str) else _of_transformers(model.base_model, _BODIES)
    except AttributeError as error:  # another transformers, or a module that was replaced
        version = f"transformers {transformers.__version__}"
        return f"this {name} of {version} lacks what packed execution reads: {error}"
    if isinstance(reading, str):
        return reading
    if isinstance(body, str):
        return f"of this {name}, {body}"
    if reading is None or body is None:
        return f"this {name} has parts that packed execution does not know"
    found = Architecture.of(body, reading)
    unknown = _unknown_part(model, found)
    return f"of this {name}, {unknown}" if unknown else found


def _reading(model: Any, answers: Answers | None) -> Reading | str | None:
    if isinstance(model, ModularReranker):
        return modular_reading(model)
    if answers is None:
        return _of_transformers(model, _READINGS)
    head, name = find_answer_head(model, answers), own_class(model).__name__
    if head is None and name not in (*CAUSAL_FAMILIES, *ENCODER_DECODERS):
        return _unknown(model)
    return None if head is None else Reading(head=head, reads="last")


def _of_transformers(
    model: Any, finders: Mapping[str, Callable[[Any], T | str | None]]
) -> T | str | None:
    """What the finder for the model's class finds; remote code may look like BERT and do something
    else.
    """
    kind = own_class(model)
    find = (
        finders.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    )
    return _unknown(model) if find is None else find(model)


def _unknown(model: Any) -> str:
    kind = own_class(model)
    if kind.__module__.startswith("transformers."):
        return f"packed execution does not know {kind.__name__}"
    return f"{model.base_model_prefix} is a {kind.__module__}.{kind.__name__}, which must be called"


def _unknown_part(model: Any, found: Architecture) -> str:
    """What a call of the model would do and packed execution would not; empty where there is
    nothing.

    It calls linear layers, activations, the embeddings around the words, and the head. The other
    modules it passes over, or reads their weights: they must be what their library made them,
    without hooks.
    """
    base = model.base_model
    above = [model.get_output_embeddings()] if base is model else model.children()
    heads = [part for part in (*above, getattr(base, "pooler", None)) if part not in (None, base)]
    others = (
        getattr(base, name, None) for name in ("embeddings", "embeddings_project", "rotary_emb")
    )
    called = {
        part
        for one in (*heads, *others, *_called(found))
        if one is not None
        for part in one.modules()
    }
    called -= set(found.word_embeddings.modules())
    for name, module in model.named_modules():
        if module in called:
            continue
        kind, place = own_class(module), name or "the model"
        if not kind.__module__.startswith(("torch.nn.", "transformers.", "rerank_fast.")):
            return f"{place} is a {kind.__module__}.{kind.__name__}, which must be called"
        sharded = kind is not type(module)  # by hooks
        if not sharded and must_be_called(module) and not _asks_for_gradients(module):
            return f"{place} has hooks or a forward of its own, which must run"
    dtypes = {
        found.word_embeddings.weight.dtype,
        *(weight.dtype for one in heads for weight in one.parameters()),
    }
    if len(dtypes) > 1:
        kinds = " and ".join(sorted(map(str, dtypes)))
        return f"the word embeddings and the score head have weights of {kinds}"
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
    for layer in (*found.layers, *(() if found.decoder is None else found.decoder.layers)):
        parts = [layer.attention_out, layer.activation, layer.down]
        if isinstance(layer, PostNormLayer):
            parts += [layer.query, layer.key, layer.value, layer.up, layer.gate, layer.mlp_dropout]
            if layer.adapter is not None:
                parts += [layer.adapter.down, layer.adapter.activation, layer.adapter.up]
            if layer.relative is not None:
                parts += [layer.relative.key, layer.relative.query]
        else:
            parts += [*layer.projections, *layer.gate_up, layer.query_norm, layer.key_norm]
            parts += [layer.attention_out_dropout, layer.mlp_dropout, layer.down_dropout]
            parts += [layer.post_attention_norm, layer.post_mlp_norm]
            norms = [layer.attention_norm, layer.mlp_norm]
            if layer.cross is not None:
                parts += [layer.cross.query, *layer.cross.keys_values, layer.cross.out]
                parts.append(layer.cross.out_dropout)
                norms.append(layer.cross.norm)
            parts += [one for one in norms if not isinstance(one, nn.LayerNorm)]
        yield from (part for part in parts if isinstance(part, nn.Module))
    if found.final_norm is not None and not isinstance(found.final_norm, nn.LayerNorm):
        yield found.final_norm
    if found.decoder is not None:
        yield found.decoder.final_norm

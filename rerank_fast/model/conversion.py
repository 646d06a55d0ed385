"""The other kind of head: of modules as sentence-transformers has them, or of a sequence
classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.modular.modules import Dense, Dropout, LayerNorm
from rerank_fast.model.modular.pooling import Pooling
from rerank_fast.model.modular.reranker import TOKENS, Entry, ModularReranker
from rerank_fast.model.packed.architectures import HeadParts, find_head_parts
from rerank_fast.model.packed.linear import is_gelu
from rerank_fast.model.preparation import Preparer
from rerank_fast.model.scoring import score

HeadKind = Literal["modular", "classification"]
_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_TYPES: dict[type, str] = {
    Pooling: "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    Dense: "sentence_transformers.base.modules.dense.Dense",
    LayerNorm: "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
    Dropout: "sentence_transformers.sentence_transformer.modules.dropout.Dropout",
}
_PAIRS = [
    ("How many people live in Berlin?", "Berlin had 3,520,031 inhabitants in 2019."),
    ("How many people live in Berlin?", "Berlin is well known for its museums. " * 20),
    ("side effects of ibuprofen", ""),
    ("东京有多少人口", "東京都の人口は約1400万人である。"),
]


def convert_head(model: CrossEncoder, kind: HeadKind) -> float:
    """Give a model the other kind of head, where both are one function; its scores stay what they
    are.

    Args:
        model: is changed in place, once the scores of both were compared.
        kind: "modular" for sentence-transformers' modules, Pooling, Dense and what else it takes;
            "classification" for the head of the encoder's own ForSequenceClassification in
            transformers.

    Returns:
        The largest difference of a score on a few pairs.

    Raises:
        ValueError: the model has this kind of head, or a head of which the other kind has no like;
            says why.
    """
    if model.answers is not None:
        raise ValueError(
            f"{model.name_or_path} scores by the logits of its answers to a prompt, and with "
            "another head a pair would be read without that prompt"
        )
    if isinstance(model.model, ModularReranker) is (kind == "modular"):
        raise ValueError(f"{model.name_or_path} has a {kind} head already")
    if model.keep_in_fp32_modules:
        raise ValueError(
            f"{model.name_or_path} keeps {', '.join(model.keep_in_fp32_modules)} in fp32, which "
            "modules alone can and by names that change with the head: expected none"
        )
    converted = to_modular(model.model) if kind == "modular" else to_classification(model.model)
    tokens = model.tokenize(_PAIRS)
    scores: list[Tensor] = []
    with torch.inference_mode():
        for one in (model.model, converted.eval()):
            scores.append(
                score(Preparer(one, model.tokenizer, dtype=torch.float32, packed=False)(tokens))
            )
    difference = float((scores[0] - scores[1]).abs().max())
    if not difference <= 1e-5 * max(1.0, float(scores[0].abs().max())):  # NaN too
        raise ValueError(
            f"a {kind} head of {model.name_or_path} scores otherwise, by up to {difference:.3g}"
        )
    model.model = converted
    return difference


def to_modular(model: Any) -> ModularReranker:
    """The encoder of a sequence classifier, and its head as modules.

    Raises:
        ValueError: the head is none that modules of sentence-transformers could be.
    """
    parts = _known_parts(model)
    width, modules, configs = model.config.hidden_size, list[nn.Module](), list[dict[str, Any]]()

    def add(module: nn.Module, config: dict[str, Any]) -> None:
        modules.append(module)
        configs.append(config)

    pooling = {"embedding_dimension": width, "pooling_mode": parts.pooling, "include_prompt": True}
    add(Pooling(pooling), pooling)
    if parts.dropout_in:
        add(Dropout({"dropout": parts.dropout_in}), {"dropout": parts.dropout_in})
    if parts.dense is not None:
        add(*_dense(parts.dense, _torch_activation(parts.activation), "sentence_embedding"))
    if parts.norm is not None:
        if parts.norm.eps != 1e-5:
            raise ValueError(
                f"the head's norm has eps {parts.norm.eps}, and sentence-transformers' 1e-05"
            )
        norm = LayerNorm({"dimension": width})
        _fill(norm.norm, parts.norm)
        add(norm, {"dimension": width})
    if parts.dropout:
        add(Dropout({"dropout": parts.dropout}), {"dropout": parts.dropout})
    add(*_dense(parts.out, nn.Identity(), "scores"))
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    entries = [
        Entry(
            "0",
            _TRANSFORMER,
            "",
            {
                "transformer_task": "feature-extraction",
                "modality_config": {"text": output},
                "module_output_name": "token_embeddings",
            },
        ),
        *(
            Entry(str(i), _TYPES[type(module)], f"{i}_{type(module).__name__}", config)
            for i, (module, config) in enumerate(zip(modules, configs, strict=True), start=1)
        ),
    ]
    encoder = model.base_model
    return ModularReranker(encoder, [module.to(encoder.dtype) for module in modules], entries)


def to_classification(model: ModularReranker) -> Any:
    """The encoder with its own class's head for one label, of the modules' weights.

    Raises:
        ValueError: the modules are not such as that head has, or its class is not known.
    """
    wanted = _parts_of_modules(model)
    config: Any = copy.deepcopy(model.config)
    config.num_labels = 1
    _configure(config, wanted)
    try:
        # Not by .to(), which would round the angles of rotary positions as well.
        classifier = AutoModelForSequenceClassification.from_config(
            config, dtype=model.encoder.dtype
        )
    except ValueError as error:
        raise ValueError(
            f"transformers has no sequence classifier of {config.model_type}"
        ) from error
    parts = _known_parts(classifier)
    name = type(classifier).__name__
    if parts.pooling != wanted.pooling:
        raise ValueError(
            f"{name} reads its tokens by {parts.pooling}, and the modules by {wanted.pooling}"
        )
    for part in ("dense", "norm"):
        if (getattr(parts, part) is None) is not (getattr(wanted, part) is None):
            has, other = ("no", "one") if getattr(parts, part) is None else ("a", "none")
            raise ValueError(
                f"the head of {name} has {has} {part} layer, and the modules have {other}"
            )
    if parts.dense is not None:
        ours, own = (_torch_activation(one.activation) for one in (wanted, parts))
        if repr(ours) != repr(own):
            raise ValueError(f"the head of {name} has the activation {own}, and the modules {ours}")
    missing = classifier.base_model.load_state_dict(
        model.encoder.state_dict(), strict=False
    ).missing_keys
    if lacking := [one for one in missing if "pooler" not in one]:
        raise ValueError(f"the encoder lacks {len(lacking)} weights of {name}, as {lacking[0]}")
    for part in ("dense", "norm", "out"):
        if getattr(parts, part) is not None:
            _fill(getattr(parts, part), getattr(wanted, part))
    return classifier


def _known_parts(model: Any) -> HeadParts:
    parts = find_head_parts(model)
    if parts is None:
        raise ValueError(f"the head of {type(model).__name__} is not one that can be converted")
    return parts


def _parts_of_modules(model: ModularReranker) -> HeadParts:
    """The modules as parts of a head: Pooling, a Dense and a LayerNorm or none, and the Dense of
    the score.
    """
    modules: list[Any] = [module for module in model.head if not isinstance(module, Dropout)]
    kinds = ", ".join(type(module).__name__ for module in model.head)
    fault = ValueError(
        f"{kinds} are no sequence classifier's head: expected Pooling, Dense and LayerNorm or "
        "none, Dense"
    )
    if model.output != TOKENS:
        read = ".".join(map(str, model.output[0]))
        raise ValueError(
            f"the modules read the encoder's {read}, and a classifier its last_hidden_state"
        )
    if len(modules) < 2:
        raise fault
    first, *between, last = modules
    plain = [one for one in modules if isinstance(one, Dense)]
    shapes = {(): (None, None), (Dense,): (0, None), (Dense, LayerNorm): (0, 1)}
    found = shapes.get(tuple(type(one) for one in between))
    if (
        found is None
        or not isinstance(first, Pooling)
        or not isinstance(last, Dense)
        or any(one.use_residual or one.module_input_name != "sentence_embedding" for one in plain)
    ):
        raise fault
    if type(last.activation_function) is not nn.Identity or len(first.pooling_mode) != 1:
        raise fault
    if not first.include_prompt:
        raise ValueError(
            "the Pooling leaves out a prompt's tokens, which no classifier's head does"
        )
    dense = None if found[0] is None else between[found[0]]
    layers = list(model.head)
    place = 0 if dense is None else layers.index(dense)
    return HeadParts(
        pooling=first.pooling_mode[0],
        dropout_in=_last_dropout(layers[:place]),
        dense=None if dense is None else dense.linear,
        activation=None if dense is None else dense.activation_function,
        norm=None if found[1] is None else between[found[1]].norm,
        dropout=_last_dropout(layers[place:]),
        out=last.linear,
    )


def _last_dropout(layers: Sequence[nn.Module]) -> float:
    found = [float(one.dropout_layer.p) for one in layers if isinstance(one, Dropout)]
    return found[-1] if found else 0.0


def _configure(config: Any, wanted: HeadParts) -> None:
    """What a config says of the head, where it does."""
    first = "bos" if config.model_type == "eurobert" else "cls"
    settings: dict[str, Any] = {
        "classifier_pooling": first if wanted.pooling == "cls" else wanted.pooling,
        "pooler_dropout": wanted.dropout_in,  # DeBERTa's
        **dict.fromkeys(
            ("classifier_dropout", "seq_classif_dropout", "cls_dropout"), wanted.dropout
        ),
    }
    if wanted.dense is not None:
        settings["classifier_bias"] = wanted.dense.bias is not None
        name = type(_torch_activation(wanted.activation)).__name__.lower()
        settings |= dict.fromkeys(("classifier_activation", "pooler_hidden_act"), name)
    for name, value in settings.items():
        if hasattr(config, name):
            try:
                setattr(config, name, value)
            except Exception as error:  # of a kind of its own, where a config checks its values
                said = f"{name} of transformers' {config.model_type} can't be {value!r}"
                raise ValueError(said) from error


def _torch_activation(activation: nn.Module | None) -> nn.Module:
    """Its counterpart in torch.nn, which a file can name."""
    if activation is None:
        return nn.Identity()
    if is_gelu(activation):
        return nn.GELU()
    # transformers has some of torch's under names of its own: SiLUActivation. Scores are compared
    # in the end.
    kind = getattr(nn, type(activation).__name__.removesuffix("Activation"), None)
    if kind is None:
        raise ValueError(f"the head's activation {type(activation).__name__} is none of torch.nn")
    return kind()


def _dense(linear: nn.Linear, activation: nn.Module, output: str) -> tuple[Dense, dict[str, Any]]:
    kind = type(activation)
    config = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__qualname__}",
        "module_input_name": "sentence_embedding",
        "module_output_name": output,
    }
    dense = Dense(config, activation)
    _fill(dense.linear, linear)
    return dense, config


@torch.no_grad()
def _fill(target: Any, source: Any) -> None:
    """Copy weight and bias; where only one of the two has a bias, it must be zero.

    Raises:
        ValueError: shapes differ, or a bias has no place.
    """
    if target.weight.shape != source.weight.shape:
        raise ValueError(
            f"a layer of the head is {tuple(source.weight.shape)}, in the other kind "
            f"{tuple(target.weight.shape)}"
        )
    target.weight.copy_(source.weight)
    if target.bias is not None:
        target.bias.zero_() if source.bias is None else target.bias.copy_(source.bias)
    elif source.bias is not None and source.bias.any():
        raise ValueError("a layer of the head has a bias, for which the other kind has no place")

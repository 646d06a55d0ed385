"""What packed families do beside scores and gradients: bounded memory, adapters, compiling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.packed.architectures import find_architecture, reason_to_pad
from rerank_fast.model.preparation import prepare_packed
from tests.model.packed.test_encoder import (
    DROPOUTS,
    LENGTHS,
    PLANS,
    gradients,
    make_model,
    make_tokens,
    packed_scores,
    padded_scores,
    relative_errors,
)

# Each with its dropout: by config in BERT's names, or in a decoder's.
FAMILIES = {
    "data2vec": "bert",
    "xmod": "bert",
    "roberta-prelayernorm": "bert",
    "nomic-bert": "bert",
    "gte": "bert",
    "jina": "bert",
    "eurobert": "llama",
    "eurobert-late": "llama",
    "mistral-sliding": "llama",
    "qwen3-sliding-both-ways": "llama",
    "gemma": "llama",
    "gemma2": "llama",
    "gemma3": "llama",
    "gemma3-both-ways": "llama",
}


def training(name: str) -> nn.Module:
    return make_model(name, **DROPOUTS[FAMILIES[name]]).train()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_cache_gives_the_gradient_of_direct_with_dropout(name: str) -> None:
    model, found = training(name), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for backward, options in (
            (backward_direct, {}),
            (backward_cached, {"device": torch.device("cpu")}),
        ):
            model.zero_grad()
            torch.manual_seed(5)
            step = prepare_packed(model, make_tokens(LENGTHS), dtype=torch.float32)
            assert step is not None
            scores = backward(step, PLANS["several"], lambda s: s.sin().sum(), **options).scores
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append((scores, grads))
    for scores, grads in found[1:]:
        torch.testing.assert_close(scores, found[0][0], rtol=1e-5, atol=1e-5)
        errors = relative_errors(grads, found[0][1])
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_on_every_linear_layer(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = make_model(name).eval()
    names = {n.rpartition(".")[2] for n, m in model.base_model.named_modules() if is_linear(m)}
    settings = peft.LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False)
    peft.LoraModel(model, settings, "default")
    assert find_architecture(model) is not None, reason_to_pad(model)
    tokens, upstream = make_tokens(LENGTHS), torch.randn(len(LENGTHS))
    expected = padded_scores(model, tokens)
    expected_gradients = gradients(model, expected, upstream)
    actual = packed_scores(model, tokens, PLANS["several"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    errors = relative_errors(gradients(model, actual, upstream), expected_gradients)
    assert max(errors.values()) < 1e-3, errors


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


@pytest.mark.parametrize("name", [pytest.param("gte", marks=pytest.mark.slow), "gemma3"])
def test_compiled_layers_give_the_eager_numbers(name: str) -> None:
    model, found = training(name), []
    for compiler in (None, "aot_eager"):
        torch.manual_seed(5)
        step = prepare_packed(model, make_tokens(LENGTHS), dtype=torch.float32, compiler=compiler)
        assert step is not None
        scores = torch.cat([step(indices) for indices in PLANS["several"]])
        found.append((scores.detach(), gradients(model, scores, torch.arange(8.0) / 8)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert max(relative_errors(found[1][1], found[0][1]).values()) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_both_ways_in_some_kernels_alone_is_padded(name: str) -> None:
    model = make_model(name, use_bidirectional_attention=True)
    assert find_architecture(model) is None
    assert "heeds use_bidirectional_attention" in reason_to_pad(model)
    model.config.is_causal = False
    assert find_architecture(model) is not None


def test_only_the_default_languages_adapter_is_read() -> None:
    from transformers import XmodConfig, XmodForSequenceClassification

    from tests.model.packed.test_encoder import ROBERTA

    config = XmodConfig(**ROBERTA, languages=["en_XX", "de_DE"], default_language="de_DE")
    model = XmodForSequenceClassification(config).eval()
    tokens = make_tokens(LENGTHS)
    with torch.no_grad():
        expected = padded_scores(model, tokens)
        actual = packed_scores(model, tokens, [np.arange(8)])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    model.config.default_language = None
    assert "names no default_language" in reason_to_pad(model)
    model.config.default_language, model.config.pre_norm = "de_DE", True
    assert "another order" in reason_to_pad(model)

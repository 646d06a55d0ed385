"""Post-norm layers with rotary positions and gates as one function, beside the same layers composed
of their modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rerank_fast.model.packed import post_norm_step
from rerank_fast.model.packed.architectures import find_architecture
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.ready_layers import ReadyLayers
from rerank_fast.model.preparation import Preparer
from rerank_fast.ops.cpu import available, unavailable_reason
from tests.model.packed import test_encoder
from tests.model.packed.test_encoder import (
    DROPOUTS,
    LENGTHS,
    make_model,
    make_tokens,
    padded_scores,
)
from tests.model.packed.test_pre_norm import check_predict, gradients_of, scores_of

pytestmark = pytest.mark.skipif(not available(), reason=unavailable_reason())
# A gate of SiLU and no biases; of GELU, with biases beside it and a dropout behind; no gate.
NAMES = ["nomic-bert", "gte", "jina"]


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on layers are composed."""
    return lambda: monkeypatch.setattr(post_norm_step, "_kernels_of", lambda *of: None)


def layers_of(model: nn.Module) -> list[Any]:
    architecture = find_architecture(model)
    assert architecture is not None
    return ReadyLayers(architecture, torch.float32, 100, compiles=False).layers


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_near_to_fp32_as_composed(name: str, compose: Callable[[], None]):
    model = make_model(name).eval()
    assert all(one.trains for one in layers_of(model))
    kernels = [gradients_of(model, torch.bfloat16), scores_of(model, torch.bfloat16)]
    with torch.inference_mode():
        kernels.append(scores_of(model, torch.bfloat16))
    compose()
    assert not any(one.trains for one in layers_of(model))
    composed = [gradients_of(model, torch.bfloat16), scores_of(model, torch.bfloat16)]
    exact = [gradients_of(model, torch.float32), scores_of(model, torch.float32)]
    for found, other, expected in zip(
        kernels, [*composed, composed[1]], [*exact, exact[1]], strict=True
    ):
        assert (found - expected).norm() < 1.3 * (other - expected).norm() + 0.01 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_predict_is_that_of_composed_layers(name: str, compose: Callable[[], None]):
    check_predict(name, compose)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_is_dropped_as_composed(name: str, compose: Callable[[], None]):
    """In attention, before both norms and behind the gate."""
    model, found = make_model(name, **DROPOUTS["bert"]).train(), []
    for change in (lambda: None, compose):
        change()
        torch.manual_seed(3)
        found.append(gradients_of(model, torch.float32))
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()
    torch.manual_seed(4)
    assert (gradients_of(model, torch.float32) - found[0]).norm() > 0.1 * found[0].norm()


@pytest.mark.parametrize("name", NAMES)
def test_the_token_that_is_read_has_its_own_position(name: str, compose: Callable[[], None]):
    """The last one's is not 0, which rotates nothing."""
    model, tokens = make_model(name).eval(), make_tokens(LENGTHS)
    architecture = find_architecture(model)
    assert architecture is not None
    architecture = replace(architecture, reads="last")

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        scores = PackedPairs(architecture, tokens, dtype=torch.float32)(np.arange(len(LENGTHS)))
        (scores * torch.linspace(-1, 1, len(LENGTHS))).sum().backward()
        grads = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        return scores.detach(), torch.cat(grads)

    scores, grads = run()
    with torch.inference_mode():
        step = PackedPairs(architecture, tokens, dtype=torch.float32)
        torch.testing.assert_close(step(np.arange(len(LENGTHS))), scores, rtol=1e-5, atol=1e-5)
    compose()
    expected, expected_grads = run()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert (grads - expected_grads).norm() < 1e-5 * expected_grads.norm()


def test_heads_as_wide_as_the_config_says(monkeypatch: pytest.MonkeyPatch):
    """Five of 8 in a stream of 48."""
    monkeypatch.setitem(test_encoder.ROTARY, "num_attention_heads", 5)
    model, tokens = make_model("nomic-bert", head_dim=8).eval(), make_tokens(LENGTHS, types=False)
    expected = padded_scores(model, tokens)
    torch.testing.assert_close(scores_of(model, torch.float32), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(scores_of(model, torch.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["", "q_proj", "bias", "layers.1"])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_get_no_gradient_and_others_theirs(name: str, frozen: str):
    model, tokens = make_model(name).eval(), make_tokens([3, 10, 7])
    for key, weight in model.named_parameters():
        weight.requires_grad_(not frozen or frozen not in key)

    def found(prepare: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad()
        prepare(tokens)(np.arange(3)).sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    actual = found(Preparer(model, None, adds_gradients=True))
    own = found(Preparer(model, None))
    for weight in model.parameters():
        weight.requires_grad_(True)
    expected = found(Preparer(model, None))
    trained = {key for key in expected if not frozen or frozen not in key}
    assert actual.keys() == own.keys() == trained
    for key in trained:
        assert torch.equal(actual[key], own[key]), key
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-6, atol=1e-7)


def test_no_more_is_kept_for_backward_than_of_bert(monkeypatch: pytest.MonkeyPatch):
    """But for the mask of a dropout behind the gate: a byte for each of its results."""
    monkeypatch.setitem(test_encoder.SIZES, "intermediate_size", 192)
    monkeypatch.setitem(test_encoder.ROTARY, "intermediate_size", 192)
    lengths = [60] * 20

    def kept(name: str) -> int:
        model = make_model(name, **DROPOUTS["bert"]).train()
        own = {one.untyped_storage().data_ptr() for one in model.parameters()}
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        architecture = find_architecture(model)
        assert architecture is not None
        step = PackedPairs(architecture, make_tokens(lengths, types=False), dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(np.arange(len(lengths)))
        return sum(storages[one].untyped_storage().nbytes() for one in storages.keys() - own)

    bert, layers = kept("bert"), 3
    copies = layers * 4 * 2 * 192 * 48  # of the weights of gates and what they are multiplied with
    assert kept("jina") < 1.02 * bert
    assert kept("nomic-bert") < 1.02 * bert + copies
    assert kept("gte") < 1.02 * bert + copies + layers * sum(lengths) * 192


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_must_be_called_is_called(name: str):
    model, called = make_model(name).train(), []
    layer = model.base_model.layers[1]
    activation = getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn
    activation.register_forward_hook(lambda *of: called.append("activation"))
    assert [one.trains for one in layers_of(model)] == [True, False, True]
    scores_of(model, torch.float32)
    with torch.inference_mode():
        scores_of(model, torch.float32)
    assert called == ["activation"] * 2


def test_what_a_hook_was_given_stays_what_it_was():
    model, seen = make_model("nomic-bert").eval(), []
    query = model.base_model.layers[-1].self_attn.q_proj
    query.register_forward_hook(lambda _, rows, out: seen.append((out, out.clone())))
    with torch.inference_mode():
        scores_of(model, torch.float32)
    ((out, then),) = seen
    assert torch.equal(out, then)


@pytest.mark.parametrize("change", ["hook", "kind"])
def test_dropout_of_somebody_behind_the_gate_is_called(change: str):
    model, called = make_model("gte").train(), []
    mlp = model.base_model.layers[0].mlp
    if change == "kind":
        mlp.dropout = nn.AlphaDropout(0.1)
    mlp.dropout.register_forward_hook(lambda *of: called.append(1))
    assert [one.trains for one in layers_of(model)] == [False, True, True]
    scores_of(model, torch.float32)
    assert called == [1]


def test_an_activation_without_kernels_is_composed():
    model = make_model("nomic-bert", hidden_act="relu").eval()
    assert not any(one.trains for one in layers_of(model))
    expected = scores_of(model, torch.float32).detach()
    with torch.inference_mode():
        torch.testing.assert_close(scores_of(model, torch.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gte", "jina"])
def test_the_kernels_of_a_gpu_give_and_drop_the_same(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, size in {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
    }.items():
        monkeypatch.setitem(test_encoder.ROTARY, key, size)
    monkeypatch.setattr("tests.model.packed.test_pre_norm.LENGTHS", [2, 3])
    model = make_model(name, **DROPOUTS["bert"]).train()
    model.base_model.embeddings.dropout.p = 0.0  # a CPU's are torch's own draws
    found = []
    for device in ("cpu", request.getfixturevalue("through_triton")):
        torch.manual_seed(3)
        found.append(gradients_of(model.to(device), torch.float32).cpu())
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()

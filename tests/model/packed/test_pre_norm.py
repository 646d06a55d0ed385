"""Pre-norm layers through a CPU's kernels beside the same layers composed of their modules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rerank_fast.model.packed import pre_norm_step
from rerank_fast.model.packed.architectures import find_architecture
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.ready_layers import ReadyLayers
from rerank_fast.model.precision.int8 import quantize_linears
from rerank_fast.model.preparation import Preparer
from rerank_fast.ops.cpu import available, unavailable_reason
from tests.model.packed.test_encoder import LENGTHS, make_model, make_tokens

pytestmark = pytest.mark.skipif(not available(), reason=unavailable_reason())
# LayerNorms and GELU, without the first norm; RMSNorms and SiLU; norms of the heads; norms of what
# is added, with capped scores and without.
NAMES = ["modernbert", "modernbert-mean", "eurobert", "qwen3", "gemma2", "gemma3"]


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on layers are composed."""
    return lambda: monkeypatch.setattr(pre_norm_step, "kernels_for", lambda *of: None)


def scores_of(model: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    architecture = find_architecture(model)
    assert architecture is not None
    tokens = make_tokens(LENGTHS, types=False)
    return PackedPairs(architecture, tokens, dtype=dtype)(np.arange(len(tokens)))


def gradients_of(model: torch.nn.Module, dtype: torch.dtype) -> Tensor:
    """Of all parameters, one after the other, each over its norm in fp32."""
    model.zero_grad()
    (scores_of(model, dtype) * torch.linspace(-1, 1, len(LENGTHS))).sum().backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def check_predict(name: str, compose: Callable[[], None]) -> None:
    """Scores in fp32 and by int8 beside those of composed layers."""
    model = make_model(name).eval()
    with torch.inference_mode():
        found = scores_of(model, torch.float32)
        quantize_linears(model)
        int8 = scores_of(model, torch.float32)
        compose()
        torch.testing.assert_close(int8, scores_of(model, torch.float32), rtol=1e-2, atol=1e-2)
    model = make_model(name).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found, scores_of(model, torch.float32), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_as_near_to_fp32_as_composed(name: str, compose: Callable[[], None]):
    model = make_model(name).eval()
    kernels = [gradients_of(model, torch.bfloat16), scores_of(model, torch.bfloat16)]
    with torch.inference_mode():
        kernels.append(scores_of(model, torch.bfloat16))
    compose()
    composed = [gradients_of(model, torch.bfloat16), scores_of(model, torch.bfloat16)]
    exact = [gradients_of(model, torch.float32), scores_of(model, torch.float32)]
    for found, other, expected in zip(
        kernels, [*composed, composed[1]], [*exact, exact[1]], strict=True
    ):
        assert not torch.equal(found, other)  # another way was taken
        assert (found - expected).norm() < 1.3 * (other - expected).norm() + 0.01 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_predict_is_that_of_composed_layers(name: str, compose: Callable[[], None]):
    check_predict(name, compose)


def test_a_part_that_must_be_called_is_called():
    model, called = make_model("eurobert"), []
    layer = model.model.layers[1]
    layer.input_layernorm.register_forward_hook(lambda *of: called.append("norm"))
    layer.self_attn.o_proj.register_forward_hook(lambda *of: called.append("product"))
    architecture = find_architecture(model)
    assert architecture is not None
    layers = ReadyLayers(architecture, torch.float32, 100, compiles=False).layers
    assert [one.parts is not None for one in layers] == [True, False, True]
    scores_of(model, torch.float32)
    assert sorted(called) == ["norm", "product"]
    called.clear()
    with torch.inference_mode():
        scores_of(model, torch.float32)
    assert sorted(called) == ["norm", "product"]


def test_a_norm_of_what_is_added_is_called_between_layers_that_are_one_function():
    model, called = make_model("gemma2"), []
    expected = gradients_of(model, torch.float32)
    norm = model.model.layers[0].post_feedforward_layernorm
    norm.register_forward_hook(lambda *of: called.append("norm"))
    architecture = find_architecture(model)
    assert architecture is not None
    layers = ReadyLayers(architecture, torch.float32, 100, compiles=False).layers
    # The first leaves its sum to the second, which adds its own: nothing is left to the third.
    assert [one.parts is not None for one in layers] == [True, False, True]
    torch.testing.assert_close(gradients_of(model, torch.float32), expected, rtol=1e-4, atol=1e-6)
    assert called == ["norm"]


@pytest.mark.parametrize("adds_gradients", [False, True])
@pytest.mark.parametrize("frozen", ["", "layers.0", "layers.1", "post_feedforward", "embed_tokens"])
def test_a_norm_of_what_is_added_is_trained_in_the_layer_behind(
    frozen: str, adds_gradients: bool, compose: Callable[[], None]
):
    model, tokens = make_model("gemma2"), make_tokens(LENGTHS, types=False)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or frozen not in name)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        step = Preparer(model, None, adds_gradients=adds_gradients)(tokens)
        scores = step(np.arange(len(tokens)))
        (scores * torch.linspace(-1, 1, len(LENGTHS))).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    compose()
    expected = gradients()
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)

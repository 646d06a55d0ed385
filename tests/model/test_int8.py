"""int8 linear layers: the op against its specification, a model against itself in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from rerank_fast import CrossEncoder
from rerank_fast.model.packed.linear import StepLinear
from rerank_fast.model.precision.int8 import Int8Linear, quantize_linears
from rerank_fast.ops import int8_linear as op
from rerank_fast.ops.int8_linear import (
    int8_gelu,
    int8_linear,
    int8_norm,
    join,
    quantize_rows,
    quantize_weight,
)
from tests.model.packed.test_encoder import (
    LENGTHS,
    PLANS,
    make_model,
    make_tokens,
    packed_scores,
    padded_scores,
)
from tests.model_factory import make_tiny_bert

needs_cpu = pytest.mark.skipif(
    not op.onednn_available(), reason="oneDNN's int8 product is not there"
)


def test_the_weights_are_within_half_a_level_of_each_output():
    weight = torch.randn(5, 33) * torch.tensor([[1e-3], [1.0], [40.0], [0.0], [1e5]])
    quantized = quantize_weight(weight, None)
    assert quantized.values.dtype == torch.int8
    error = (quantized.values * quantized.scale[:, None] - weight).abs().amax(dim=1)
    assert (error <= weight.abs().amax(dim=1) / 127 / 2 * 1.001).all()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 4), (3, 33, 17), (77, 384, 130), (200, 65, 1)])
def test_the_kernel_equals_the_reference(
    shape: tuple[int, int, int], bias: bool, dtype: torch.dtype
):
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x = (torch.randn(rows, inputs) * torch.logspace(-4, 4, rows)[:, None]).to(dtype)
    x[0] = 0
    weight = quantize_weight(torch.randn(outputs, inputs), torch.randn(outputs) if bias else None)
    actual, expected = (int8_linear(x, weight, backend=backend) for backend in ("cpu", "reference"))
    assert actual.dtype == dtype
    # The integers are the same but for a value that lies between two; bf16 rounds the product, to
    # which a bias of the other sign may be added, and then the result.
    magnitude = expected.float().abs() + 2 * weight.added.abs()
    error = (actual.float() - expected.float()).abs() / magnitude.amax(dim=1, keepdim=True).clamp(
        min=1e-6
    )
    assert error.max() < (1e-5 if dtype == torch.float32 else 2e-2)


@needs_cpu
def test_the_largest_values_there_are():
    """Sums of neighbours in 16 bits would be cut off."""
    x, weight = torch.ones(3, 384), quantize_weight(torch.ones(5, 384), None)
    torch.testing.assert_close(int8_linear(x, weight), torch.full((3, 5), 384.0))
    torch.testing.assert_close(int8_linear(-x, weight), torch.full((3, 5), -384.0))


def assert_rows_close(rows: op.Int8Rows, exact: torch.Tensor, tolerance: float):
    """Every value within half a level of the exact one, the scale that of the largest."""
    levels = op.activation_levels()
    largest = exact.abs().amax(dim=1)
    torch.testing.assert_close(rows.scale * levels, largest, rtol=tolerance, atol=tolerance)
    values = (rows.values.float() - levels - 1) * rows.scale[:, None]
    bound = (0.5 * rows.scale[:, None] + tolerance * largest.clamp(min=1)[:, None]) * 1.0001
    assert ((values - exact).abs() <= bound).all(), ((values - exact).abs() / bound).max()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 4), (3, 33, 17), (77, 384, 130)])
def test_what_follows_a_product(shape: tuple[int, int, int], bias: bool, dtype: torch.dtype):
    """GELU, or a residual and a norm, to int8 again: as PyTorch's of the reference's product."""
    rows, inputs, outputs = shape
    torch.manual_seed(0)
    x = (torch.randn(rows, inputs) * torch.logspace(-2, 1, rows)[:, None]).to(dtype)
    weight = quantize_weight(
        torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) if bias else None
    )
    quantized = quantize_rows(x)
    assert_rows_close(quantized, x.float(), 1e-6)
    product = int8_linear(x.float(), weight, backend="reference")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the product comes in bf16
    residual, norm_weight, norm_bias = (
        torch.randn(rows, outputs),
        torch.randn(outputs),
        torch.randn(outputs),
    )
    normed = nn.functional.layer_norm(residual + product, (outputs,), norm_weight, norm_bias, 1e-5)
    for backend in ("cpu", "reference"):
        for given in (x, quantized):
            activated = int8_gelu(given, weight, backend=backend)
            assert activated.dtype == dtype
            assert_rows_close(activated, nn.functional.gelu(product), tolerance)
            y, again = int8_norm(
                given, weight, residual, norm_weight, norm_bias, eps=1e-5, backend=backend
            )
            torch.testing.assert_close(y, normed, rtol=tolerance, atol=4 * tolerance)
            assert_rows_close(again, y, 1e-6)
    few = torch.tensor([rows - 1, 0])
    torch.testing.assert_close(activated[few].dequantize(), activated.dequantize()[few])


@needs_cpu
def test_a_gelu_of_large_values():
    """Where the kernel's polynomial ends."""
    x = torch.linspace(-40, 40, 4001)[:, None]
    weight = quantize_weight(torch.ones(1, 1), None)
    actual = int8_gelu(x, weight)
    exact = nn.functional.gelu(int8_linear(x, weight))
    assert (
        (actual.values.float() - op.activation_levels() - 1) * actual.scale[:, None] - exact
    ).abs().max() < 2e-3


@needs_cpu
def test_a_rows_result_does_not_depend_on_the_others():
    weight = quantize_weight(torch.randn(16, 24), torch.randn(16))
    x = torch.randn(40, 24)
    alone = torch.cat([int8_linear(row[None], weight) for row in x])
    x[7] *= 1e6
    together = int8_linear(x, weight)
    kept = [n for n in range(40) if n != 7]
    torch.testing.assert_close(together[kept], alone[kept], rtol=0, atol=0)


def test_without_vnni_no_sum_of_two_products_overflows(monkeypatch):
    monkeypatch.setattr(op, "activation_levels", lambda: 63)
    x, weight = torch.ones(2, 64), quantize_weight(torch.ones(3, 64), None)
    torch.testing.assert_close(int8_linear(x, weight), torch.full((2, 3), 64.0))
    levels = 63
    assert 2 * (2 * levels + 1) * 127 <= 32767


def test_joined_weights_are_their_outputs_side_by_side():
    parts = [quantize_weight(torch.randn(n, 12), torch.randn(n)) for n in (3, 5)]
    x = torch.randn(6, 12)
    torch.testing.assert_close(
        int8_linear(x, join(parts)), torch.cat([int8_linear(x, part) for part in parts], 1)
    )
    with pytest.raises(ValueError, match="bias for all or none of 2"):
        join([parts[0], quantize_weight(torch.randn(3, 12), None)])


def test_what_the_op_refuses():
    weight = quantize_weight(torch.randn(3, 4), None)
    with pytest.raises(ValueError, match=r"shape \(T, 4\), got torch.float32 \(2, 5\)"):
        int8_linear(torch.randn(2, 5), weight)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        int8_linear(torch.randn(2, 4).double(), weight)
    with pytest.raises(ValueError, match="for inference"):
        int8_linear(torch.randn(2, 4, requires_grad=True), weight)
    with pytest.raises(ValueError, match="backend must be one of"):
        int8_linear(torch.randn(2, 4), weight, backend="mkl")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"residual must be fp32 of shape \(2, 3\), got torch.float32 \(2, 4\)"
    ):
        int8_norm(
            torch.randn(2, 4), weight, torch.randn(2, 4), torch.ones(3), torch.ones(3), eps=1e-5
        )
    with pytest.raises(ValueError, match="as many rows in x as in residual, got 1 and 2"):
        int8_norm(
            torch.randn(1, 4), weight, torch.randn(2, 3), torch.ones(3), torch.ones(3), eps=1e-5
        )


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "roberta",
        "electra",
        "distilbert",
        "modernbert",
        "llama",
        "qwen3",
        "data2vec",
        "xmod",
        "roberta-prelayernorm",
        "nomic-bert",
        "gte",
        "jina",
        "eurobert",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3",
        "deberta-v2",
        "deberta-v3",
    ],
)
def test_packed_models_in_int8(name: str):
    """Every layer's products in int8, joined or not, are those of the padded model whose layers are
    replaced.
    """
    model = make_model(name).eval()
    tokens = make_tokens(LENGTHS, types=False)
    with torch.inference_mode():
        exact = padded_scores(model, tokens)
        head = {
            part: p.clone()
            for part, p in model.named_parameters()
            if "classifier" in part or "score" in part
        }
        quantize_linears(model)
        left = [
            part for part, module in model.base_model.named_modules() if type(module) is nn.Linear
        ]
        assert all("pooler" in part for part in left)
        scores, padded = (
            packed_scores(model, tokens, PLANS["several"]),
            padded_scores(model, tokens),
        )
    assert all(torch.equal(p, head[part]) for part, p in model.named_parameters() if part in head)
    # Packed, ModernBERT's rotations and the others' GELU and norms round differently, which may
    # turn a level of an activation.
    bound = 1e-4 if name in ("llama", "qwen3") else 0.02
    torch.testing.assert_close(scores, padded, rtol=bound, atol=bound * float(exact.abs().max()))
    assert not torch.equal(scores, exact)


def test_a_joined_product_is_kept():
    modules = [Int8Linear(quantize_weight(torch.randn(n, 6), None)) for n in (4, 2, 2)]
    first, again = (StepLinear(modules, torch.float32, 100) for _ in range(2))
    assert first.int8 is not None
    assert first.int8 is again.int8
    x = torch.randn(5, 6)
    torch.testing.assert_close(first(x), torch.cat([module(x) for module in modules], dim=1))


def test_cross_encoder_in_int8(tmp_path: Path):
    make_tiny_bert(tmp_path)
    pairs = [("what is a panda", "a panda is a bear " * n) for n in range(1, 9)]
    exact, model = (
        CrossEncoder(tmp_path, device="cpu"),
        CrossEncoder(tmp_path, device="cpu", dtype="int8"),
    )
    np.testing.assert_allclose(model.predict(pairs), exact.predict(pairs), atol=0.03)
    # A pair's score does not depend on what it is scored with.
    alone = [model.predict(pair) for pair in pairs]
    np.testing.assert_allclose(model.predict(pairs), alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="int8 weights are for inference and can't be saved"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="for inference"):
        model.prepare(model.tokenize(pairs))(np.arange(len(pairs)))
    with pytest.raises(ValueError, match="int8 is for the CPU"):
        CrossEncoder(tmp_path, device="meta", dtype="int8")


def test_models_that_are_padded_run_in_int8_too(tmp_path: Path):
    tokenizer = CrossEncoder(make_tiny_bert(tmp_path / "bert")).tokenizer
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        conv_kernel_size=3,  # which packed execution does not know
        num_labels=1,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(tmp_path / "deberta")
    tokenizer.save_pretrained(tmp_path / "deberta")
    pairs = [("what is a panda", "a panda is a bear"), ("rain", "the sea")]
    exact = CrossEncoder(tmp_path / "deberta", device="cpu").predict(pairs)
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "deberta", dtype="int8").predict(pairs), exact, atol=0.02
    )

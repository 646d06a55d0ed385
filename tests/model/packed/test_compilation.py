"""Compiled layers: few graphs whatever the lengths, and the numbers of eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from rerank_fast import CrossEncoder, score
from rerank_fast.model.gradient_cache import backward_cached, backward_direct
from rerank_fast.model.packed import compilation, pre_norm_step
from rerank_fast.model.packed.compilation import check_compiler
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.preparation import prepare_packed
from rerank_fast.model.tokens.packing import plan_micro_batches
from tests.model.modular_factory import PAIRS, ettin, make_peer
from tests.model.packed.test_encoder import (
    WITHOUT_TYPES,
    gradients,
    make_model,
    make_tokens,
    relative_errors,
)
from tests.model.test_encoder_decoders import ANSWERS, make_t5

DROPOUT = {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.2}


@pytest.fixture(scope="module")
def new_graphs() -> Iterator[Callable[[], int]]:
    """Graphs since it was asked last. Compiling takes seconds: tests share what is compiled
    already.
    """
    torch.compiler.reset()
    compilation.compiled_layer.cache_clear()
    counters.clear()
    seen = 0

    def count() -> int:
        nonlocal seen
        assert not counters["graph_break"], dict(counters["graph_break"])
        before, seen = seen, counters["stats"]["unique_graphs"]
        return seen - before

    yield count
    torch.compiler.reset()
    compilation.compiled_layer.cache_clear()


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    return make_model("bert", **DROPOUT).train()


def step_of(model: torch.nn.Module, seed: int, **options: Any) -> PackedPairs:
    lengths = np.random.default_rng(seed).integers(3, 60, size=12)
    types = model.config.model_type not in WITHOUT_TYPES
    step = prepare_packed(model, make_tokens(list(lengths), types=types, seed=seed), **options)
    assert step is not None
    return step


def two_steps(
    model: torch.nn.Module, backward: Callable[..., Any] = backward_direct, **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores and summed gradients of steps with other lengths, cut into micro-batches of 1 to 5
    pairs.
    """
    torch.manual_seed(3)
    model.zero_grad()
    scores = []
    for seed in range(2):
        step = step_of(model, seed, **options)
        plan = [
            *plan_micro_batches(step.tokens.lengths[:9], max_tokens=160),
            np.array([9]),
            np.array([10, 11]),
        ]
        device = {"device": next(model.parameters()).device} if backward is backward_cached else {}
        scores.append(backward(step, plan, lambda values: values.sin().sum(), **device).scores)
    return torch.cat(scores), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_the_same(
    actual: tuple[torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert max(relative_errors(actual[1], expected[1]).values()) < 1e-5


def test_lengths_numbers_of_pairs_layers_and_steps_share_two_graphs(
    bert: torch.nn.Module, new_graphs: Callable[[], int]
):
    new_graphs()
    for seed in range(3):
        step = step_of(bert, seed, dtype=torch.float32, compiler="aot_eager")
        parts = [
            part for size in (5, 2, 4, 1) for part in np.split(np.arange(12), range(size, 12, size))
        ]
        torch.cat([step(indices) for indices in parts]).sum().backward()
    assert new_graphs() == 2  # a layer, and the last one


def test_the_same_seeds_drop_the_same_and_steps_differ(
    bert: torch.nn.Module, new_graphs: Callable[[], int]
):
    new_graphs()
    expected = two_steps(bert, dtype=torch.float32)
    assert_the_same(two_steps(bert, dtype=torch.float32, compiler="aot_eager"), expected)
    step = step_of(bert, 0, dtype=torch.float32, compiler="aot_eager")
    first, second = step(np.arange(12)), step(np.arange(12))
    assert not torch.allclose(first, second, atol=1e-3)
    assert new_graphs() <= 2


def test_bounded_memory_keeps_the_gradient(bert: torch.nn.Module, new_graphs: Callable[[], int]):
    new_graphs()
    expected = two_steps(bert, dtype=torch.float32)
    assert_the_same(
        two_steps(bert, backward_cached, dtype=torch.float32, compiler="aot_eager"), expected
    )
    assert new_graphs() <= 4  # with a graph for the backward pass, and without one
    bert.gradient_checkpointing_enable()
    try:
        for backward in (backward_direct, backward_cached):
            assert_the_same(
                two_steps(bert, backward, dtype=torch.float32, compiler="aot_eager"), expected
            )
    finally:
        bert.gradient_checkpointing_disable()
    assert new_graphs() == 0


def test_modernberts_kinds_of_layers_in_bf16(
    new_graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    """Its first layer has no norm, then one slides, one doesn't, and the last slides too.

    Beside the composed layers that are traced: fused ones round elsewhere.
    """
    new_graphs()
    model = make_model("modernbert-last-layer-slides").train()
    with monkeypatch.context() as composed:
        composed.setattr(pre_norm_step, "kernels_for", lambda device, dtype: None)
        expected = two_steps(model, dtype=torch.bfloat16)
    assert_the_same(two_steps(model, dtype=torch.bfloat16, compiler="aot_eager"), expected)
    assert new_graphs() == 4


def test_debertas_relative_positions(new_graphs: Callable[[], int]):
    """The dropout of their embeddings is drawn on the host, before what is traced."""
    new_graphs()
    model = make_model("deberta-v3", **DROPOUT).train()
    expected = two_steps(model, dtype=torch.float32)
    assert_the_same(two_steps(model, dtype=torch.float32, compiler="aot_eager"), expected)
    assert new_graphs() == 2


def test_the_layers_under_modules(tmp_path: Path, new_graphs: Callable[[], int]):
    make_peer(tmp_path, ettin("cls"), "bert")
    found = []
    new_graphs()
    for compiler in (None, "aot_eager"):
        model = CrossEncoder(tmp_path / "model", device="cpu")
        if compiler is not None:
            model.compile(backend=compiler)
        scores = score(model.prepare(model.tokenize(PAIRS)))
        found.append((scores.detach(), gradients(model, scores, torch.ones(len(PAIRS)))))
    assert_the_same(found[1], found[0])
    assert new_graphs() == 2


def test_t5s_relative_bias_and_attention_over_what_is_encoded(new_graphs: Callable[[], int]):
    model, found = make_t5("t5-1.1", num_layers=1, num_decoder_layers=1).eval(), []
    new_graphs()
    tokens = make_tokens([9, 4, 1, 7], types=False)
    for compiler in (None, "aot_eager"):
        step = prepare_packed(model, tokens, answers=ANSWERS, compiler=compiler)
        scores = torch.cat([step(np.arange(3)), step(np.arange(2, 4))])
        found.append((scores.detach(), gradients(model, scores, torch.ones(5))))
    assert_the_same(found[1], found[0])
    assert new_graphs() <= 2  # a layer of the encoder, and of the decoder


def test_inductor_gives_the_eager_numbers(bert: torch.nn.Module, new_graphs: Callable[[], int]):
    new_graphs()
    expected = two_steps(bert, dtype=torch.float32)
    assert_the_same(two_steps(bert, dtype=torch.float32, compiler="inductor"), expected)
    assert new_graphs() == 2


def test_on_a_cpu_scoring_is_not_compiled(bert: torch.nn.Module, new_graphs: Callable[[], int]):
    new_graphs()
    with torch.inference_mode():
        step_of(bert, 0, compiler="aot_eager")(np.arange(12))
    assert new_graphs() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["bert", "modernbert-last-layer-slides"])
def test_on_a_gpu(name: str, new_graphs: Callable[[], int]):
    """Training and scoring, in bf16, where attention without dropout is torch's own."""
    still = (
        {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0} if name == "bert" else {}
    )
    model = make_model(name, **still).cuda().train()
    new_graphs()
    expected = two_steps(model, dtype=torch.bfloat16)
    actual = two_steps(model, dtype=torch.bfloat16, compiler="inductor")
    torch.testing.assert_close(actual[0], expected[0], rtol=0.05, atol=0.05)
    assert max(relative_errors(actual[1], expected[1]).values()) < 0.05
    assert new_graphs() == {"bert": 2}.get(name, 4)
    with torch.inference_mode():
        scores = [
            step_of(model.eval(), 0, compiler=which)(np.arange(12)) for which in (None, "inductor")
        ]
    torch.testing.assert_close(scores[1], scores[0], rtol=0.01, atol=0.01)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch):
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"needs a C\+\+ compiler on a CPU, and there is no no-such-compiler"
    ):
        check_compiler(torch.device("cpu"))

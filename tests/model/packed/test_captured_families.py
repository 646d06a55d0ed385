"""Each family's training step by graphs: what is captured, and that replays give eager numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.tools.gpu_counts import counting
from benchmarks.tools.gpu_stand_ins import standing_in_for_graphs
from rerank_fast.model.packed.architectures import find_architecture
from rerank_fast.model.packed.graphs import TrainingGraphs
from rerank_fast.model.preparation import Preparer
from rerank_fast.model.tokens.packing import TokenizedPairs
from tests.model.packed import test_encoder
from tests.model.packed.graph_stand_in import StandIn
from tests.model.packed.test_encoder import MODELS, NO_DROPOUT, make_model, make_tokens

pytest.importorskip("triton")
CUTS_KEYS = "a last layer with a window that is read at its first token"


def refusal(name: str) -> str:
    if name == "modernbert-last-layer-slides":
        return CUTS_KEYS
    architecture = find_architecture(MODELS[name]())
    assert architecture is not None
    relative = any(layer.relative is not None for layer in architecture.layers)
    return "relative positions" if relative else ""


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_copy_and_two_replays(name: str) -> None:
    """On meta tensors, where a copy or the read of a value in a capture is an error."""
    with torch.device("meta"):
        model = MODELS[name]().train()
    prepare = Preparer(model, None, dtype=torch.bfloat16, graph_seed=3)
    lengths = [5, 17, 33], [40, 9, 6]  # of one bucket
    if refusal(name):
        with pytest.raises(ValueError, match=f"must be off here: {refusal(name)} can't be capt"):
            prepare(make_tokens(lengths[0]))
        return
    with counting(np.ones(1, np.int64)) as counts, standing_in_for_graphs(counts):
        for numbers in lengths:
            counts.begin(str(numbers))
            tokens = make_tokens(numbers)
            prepare(tokens)(np.arange(3)).sum().backward()
            model.zero_grad()
    tally = counts.phases[str(lengths[1])]
    assert (tally.uploads, tally.syncs, len(tally.replays)) == (1, 0, 2)
    # Heads, their gradients, and weights that are cast once a step: as many as a layer has.
    assert tally.launches < 40
    assert sum(tally.replays) > 6 * len(prepare.architecture.layers)  # type: ignore[union-attr]


def few_heads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The interpreter goes head by head, and layer by layer."""
    tables = "SIZES", "ROBERTA", "MODERN", "ROTARY", "SLIDING", "DECODER", "GEMMA2", "GEMMA3"
    for table in (getattr(test_encoder, one) for one in tables):
        monkeypatch.setitem(table, "num_attention_heads", 2)
        if "num_key_value_heads" in table:
            monkeypatch.setitem(table, "num_key_value_heads", 1)
        if not name.startswith(("modernbert", "gemma2", "gemma3")):
            monkeypatch.setitem(table, "num_hidden_layers", 2)


def batch(lengths: tuple[int, ...]) -> TokenizedPairs:
    return make_tokens([*lengths], types=False, seed=sum(lengths))


SLOW = [
    "modernbert-mean",
    "modernbert",
    "eurobert",
    "eurobert-mean",
    "llama",
    "qwen2-sliding",
    "gemma",
    "gemma2",
    "gemma3",
]
SLOW += ["mistral-sliding", "qwen3-sliding-both-ways", "roberta", "roberta-prelayernorm", "jina"]


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_replays_give_eager_numbers(
    name: str,
    through_triton: str,
    replays: list[StandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit those of the bucket's tokens run eagerly, with other weights and a longer pair at
    the second step, with dropout of attention; and but for rounding those of the pairs alone."""
    few_heads(monkeypatch, name)
    # ModernBERT's drops out what attention adds too, by torch.
    as_bert = name.startswith(("roberta", "jina"))
    has_own = not as_bert and not name.startswith("modernbert")
    dropout = {"attention_dropout": 0.3} if has_own else {}
    model = make_model(name, **(NO_DROPOUT if as_bert else dropout))
    model = model.to(through_triton).train()
    steps = [batch(lengths) for lengths in ((3, 4), (6, 1))]

    def run(num_steps: int = 2, **options: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
        prepare, found = Preparer(model, None, **options), []
        before = {key: one.clone() for key, one in model.state_dict().items()}
        torch.manual_seed(5)
        for tokens in steps[:num_steps]:
            model.zero_grad()
            scores = prepare(tokens)(np.arange(len(tokens)))
            (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
            found.append((scores.detach(), gradients(model)))
            with torch.no_grad():
                for one in model.parameters():
                    one.add_(one.grad if one.grad is not None else 0, alpha=-0.01)
        model.load_state_dict(before)
        return found

    actual = run(graph_seed=7)
    assert len(replays) == 1
    monkeypatch.setattr(TrainingGraphs, "_read", lambda one, *of: one._encoder(*of))
    expected = run(graph_seed=7)
    assert len(replays) == 1
    for (scores, found), (same, wanted) in zip(actual, expected, strict=True):
        assert torch.equal(scores, same)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in found)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    ((scores, found),), ((same, wanted),) = run(1, graph_seed=7), run(1)
    torch.testing.assert_close(scores, same, rtol=1e-4, atol=1e-5)
    largest = max(float(one.norm()) for one in wanted.values())
    for key, one in wanted.items():
        assert (found[key] - one).norm() < 1e-4 * one.norm() + 1e-5 * largest, key


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}


def tiny(name: str, change: Callable[[nn.Module], object], **options: Any) -> nn.Module:
    model = make_model(name, **options).train()
    change(model)
    return model


def forget(*arguments: object) -> None:
    return None


@pytest.mark.parametrize(
    ("part", "name", "change"),
    [
        ("a hook of a module", "qwen3", lambda one: one.model.norm.register_forward_hook(forget)),
        (
            "a hook of a parameter",
            "llama",
            lambda one: one.model.norm.weight.register_hook(forget),
        ),
        (
            "rotary positions that follow from a batch's longest text",
            "llama",
            lambda one: setattr(one.model.rotary_emb, "rope_type", "dynamic"),
        ),
        (
            "rotary positions that follow from a batch's longest text",
            "gemma3",
            lambda one: one.model.rotary_emb.rope_type.update(full_attention="longrope"),
        ),
    ],
)
def test_a_part_that_cannot_be_captured_is_named(
    part: str, name: str, change: Callable[[nn.Module], object]
) -> None:
    with pytest.raises(ValueError, match=f"CUDA graphs must be off here: {part} can't be capt"):
        Preparer(tiny(name, change), None, graph_seed=7)(batch((3,)))


def test_what_torch_drops_out_is_refused_and_without_it_captured(
    through_triton: str, replays: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_heads(monkeypatch, "eurobert")
    model = tiny("modernbert-mean", forget, embedding_dropout=0.1).to(through_triton)
    prepare, tokens = Preparer(model, None, graph_seed=7), batch((3,))
    with pytest.raises(ValueError, match="dropout that is drawn by torch can't be captured"):
        prepare(tokens)(np.arange(1))
    model.eval()
    prepare(tokens)(np.arange(1))
    assert len(replays) == 1


def test_weights_that_moved_or_were_frozen_are_captured_anew(
    through_triton: str, replays: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_heads(monkeypatch, "eurobert")
    monkeypatch.setitem(test_encoder.DECODER, "num_hidden_layers", 1)
    model = make_model("eurobert").to(through_triton).train()
    prepare, tokens = Preparer(model, None, graph_seed=7), batch((3,))

    def step() -> Tensor:
        model.zero_grad()
        scores = prepare(tokens)(np.arange(1))
        scores.sum().backward()
        return scores.detach()

    first = step()
    norm: Any = model.model.norm
    norm.weight.data = 2 * norm.weight.data  # as load_state_dict(assign=True) and .to() do
    assert not torch.equal(step(), first)
    assert len(replays) == 2
    norm.weight.requires_grad_(False)
    step()
    assert norm.weight.grad is None
    assert len(replays) == 3
    for one in model.model.parameters():
        one.requires_grad_(False)
    step()  # the head alone
    assert len(replays) == 3
    assert model.classifier.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["bert", "modernbert", "mistral-sliding", "qwen3", "gemma3"])
def test_a_gpus_own_graphs_give_eager_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA has captured, beside the bucket run eagerly."""
    model = make_model(name, **(NO_DROPOUT if name == "bert" else {})).to("cuda").train()
    steps = [batch(lengths) for lengths in ((3, 40), (60, 1), (2, 3), (3, 40))]

    def run() -> list[tuple[Tensor, dict[str, Tensor]]]:
        prepare = Preparer(model, None, graph_seed=7)
        found = []
        for tokens in steps:
            model.zero_grad()
            scores = prepare(tokens)(np.arange(len(tokens)))
            scores.square().sum().backward()
            found.append((scores.detach(), gradients(model)))
        return found

    def scored(**options: Any) -> list[Tensor]:
        prepare = Preparer(model.eval(), None, **options)
        with torch.inference_mode():
            return [prepare(tokens)(np.arange(len(tokens))) for tokens in steps]

    actual = run()
    for found, expected in zip(scored(captures=True), scored(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.train()
    monkeypatch.setattr(TrainingGraphs, "_read", lambda one, *of: one._encoder(*of))
    for (scores, found), (same, wanted) in zip(actual, run(), strict=True):
        torch.testing.assert_close(scores, same, rtol=1e-5, atol=1e-5)
        largest = max(float(one.norm()) for one in wanted.values())
        for key, one in wanted.items():
            assert (found[key] - one).norm() < 1e-4 * one.norm() + 1e-5 * largest, key

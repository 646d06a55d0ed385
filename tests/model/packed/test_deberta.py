"""DeBERTa-v2 and v3: what of them is not as in other families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

from rerank_fast import CrossEncoder
from rerank_fast.data.tokenized import tokenize_lists
from rerank_fast.model.packed.architectures import find_architecture, reason_to_pad
from rerank_fast.model.packed.architectures.deberta import _slots
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.heads import DenseHead
from rerank_fast.model.packed.linear import StepLinear
from rerank_fast.model.packed.relative import RelativeStep
from rerank_fast.model.preparation import Preparer
from tests.model.packed.test_encoder import (
    LENGTHS,
    PLANS,
    POSITIONS,
    deberta,
    gradients,
    make_model,
    make_tokens,
    packed_scores,
    padded_scores,
    relative_errors,
)
from tests.model.test_gradient_cache import push
from tests.model_factory import make_tiny_deberta
from tests.training.conftest import make_lists

PAIRS = [("what is the panda", doc) for doc in ("a kind of bear", "rain and wind", "", "sea " * 40)]


@pytest.mark.parametrize(
    ("buckets", "farthest", "length"),
    [(256, 512, 700), (8, 64, 64), (32, 64, 90), (-1, 24, 24), (-1, 10, 40), (2, 5, 12)],
)
def test_slots_are_the_models(buckets: int, farthest: int, length: int) -> None:
    """Both ways round: position to content takes the distance from key to query."""
    rows = torch.empty(1, length, 1)
    theirs = build_relative_position(rows, rows, buckets, farthest)[0]
    span = buckets if buckets > 0 else farthest
    table = _slots(buckets, farthest, torch.device("cpu"))
    place = torch.arange(length)
    distance = (place[:, None] - place[None, :]).clamp(-farthest, farthest)
    ours = table[distance + farthest].long()
    assert torch.equal(ours, (theirs + span).clamp(0, 2 * span - 1))
    assert torch.equal(ours, (-theirs.t() + span).clamp(0, 2 * span - 1))


@pytest.mark.parametrize("pooler_dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_gives_the_gradient_of_direct_with_dropout(
    tmp_path: Path, pooler_dropout: float, checkpointing: bool
) -> None:
    path = make_tiny_deberta(tmp_path, pooler_dropout=pooler_dropout)
    model, other = (CrossEncoder(path, device="cpu").train() for _ in range(2))
    lists = tokenize_lists(list(make_lists(6)), model)
    if checkpointing:
        other.gradient_checkpointing_enable()
    expected, direct, drawn = push(model, lists, cached=False)
    found, cached, also_drawn = push(other, lists, cached=True)
    assert torch.equal(direct.scores, cached.scores)
    assert torch.equal(drawn, also_drawn)
    assert found.keys() == expected.keys()
    assert "model.deberta.encoder.rel_embeddings.weight" in found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    torch.manual_seed(8)
    assert not torch.equal(
        Preparer(model.model, model.tokenizer)(lists.pairs)(np.arange(4)), direct.scores[:4]
    )


def test_saved_and_opened_again_by_both(tmp_path: Path) -> None:
    path = make_tiny_deberta(tmp_path / "made")
    model = CrossEncoder(path, device="cpu")
    assert not model.prepare(model.tokenize(PAIRS)).padded
    expected = PeerCrossEncoder(str(path), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    for kind in (CrossEncoder, PeerCrossEncoder):
        again = kind(str(tmp_path / "saved"), device="cpu")
        np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-5)


def test_dropout_of_the_relative_embeddings_has_its_rate() -> None:
    """One draw for all sequences of a micro-batch, another for each layer; none in evaluation."""
    model = make_model("deberta-v3", hidden_dropout_prob=0.3).train()
    architecture = find_architecture(model)
    terms = architecture.layers[0].relative
    step = RelativeStep(terms, 4, torch.float32, None)
    one, two = (step.prepare(9, None, seed).factors for seed in (1, 2))
    assert torch.equal(one, step.prepare(9, None, 1).factors)
    assert not torch.equal(one, two)
    assert one.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs(float((one == 0).float().mean()) - 0.3) < 5 * (0.21 / one.numel()) ** 0.5
    model.eval()
    assert step.prepare(9, None, 1).factors is None


def test_what_is_refused_says_why_and_heads_are_fused_where_they_can_be() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_labels": 1}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 16, "max_position_embeddings": 20}
    convolved = deberta(**sizes, relative_attention=True, conv_kernel_size=3)
    assert "convolution over neighbouring tokens" in reason_to_pad(convolved)
    twice = deberta(**sizes)
    twice.deberta.z_steps = 2
    assert "the last layer runs more than once" in reason_to_pad(twice)
    listened = make_model("deberta-v2")
    listened.deberta.encoder.rel_embeddings.register_forward_hook(lambda *_: None)
    assert "encoder.rel_embeddings has hooks" in reason_to_pad(listened)
    assert isinstance(find_architecture(make_model("deberta-v3")).head, DenseHead)


@pytest.mark.parametrize("name", ["deberta-v2", "deberta-v3"])
def test_projections_that_somebody_listens_to_are_called_for_positions_too(name: str) -> None:
    model = make_model(name).eval()
    own = "key_proj" if name == "deberta-v3" else "pos_key_proj"
    for layer in model.deberta.encoder.layer:
        projection = getattr(layer.attention.self, own)
        projection.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    tokens = make_tokens(LENGTHS, types=False)
    expected = padded_scores(model, tokens)
    actual = packed_scores(model, tokens, PLANS["several"])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(len(tokens))
    found = gradients(model, actual, upstream)
    assert max(relative_errors(found, gradients(model, expected, upstream)).values()) < 1e-4


@pytest.mark.parametrize("grads", [False, True])
def test_embeddings_that_no_distance_names_are_not_projected(grads: bool, monkeypatch) -> None:
    """And without gradients none of them twice: micro-batches share what is there."""
    model = make_model("deberta-v2").eval()
    tokens = make_tokens([3, POSITIONS, 2, 5])
    projected: list[int] = []
    project = StepLinear.__call__

    def count(linear: StepLinear, rows: torch.Tensor) -> torch.Tensor:
        if any(linear is one for layer in step.layers for one in layer.relative.linears):
            projected.append(len(rows))
        return project(linear, rows)

    monkeypatch.setattr(StepLinear, "__call__", count)
    with torch.set_grad_enabled(grads):
        step = PackedPairs(find_architecture(model), tokens, dtype=torch.float32)
        scores = [step(np.array(indices)) for indices in ([0, 2], [1], [3])]
        expected = padded_scores(model, tokens)
    torch.testing.assert_close(torch.cat(scores), expected[[0, 2, 1, 3]], rtol=1e-5, atol=1e-5)
    products = 2 * len(step.layers)  # of keys and queries
    reach = model.config.max_position_embeddings  # 64 tokens or fewer are no farther apart than 64
    counts = [129, 2 * reach, 129] if grads else [129, 2 * reach]
    assert projected == [count for count in counts for _ in range(products)]


def test_positions_follow_the_weights_from_step_to_step() -> None:
    """A run keeps its layers, and a cached step goes through them first without gradients."""
    model = make_model("deberta-v2").eval()
    tokens = make_tokens([3, 10, 7])
    kept = Preparer(model, None)
    for _ in range(2):
        model.zero_grad()
        step = kept(tokens)
        with torch.no_grad():
            first = step(np.arange(3))
        second = step(np.arange(3))
        second.sum().backward()
        torch.testing.assert_close(first, padded_scores(model, tokens), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second, first)
        tables = model.deberta.encoder.layer[0].attention.self.pos_key_proj.weight
        assert tables.grad.any()
        with torch.no_grad():
            tables.mul_(3).add_(0.1)

"""Scores by replays: equal to eager ones, of the weights as they are, in several threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from benchmarks.tools.gpu_counts import counting
from benchmarks.tools.gpu_stand_ins import standing_in_for_graphs
from rerank_fast import CrossEncoder
from rerank_fast.model.packed import graphs
from rerank_fast.model.packed.buckets import COARSE, FINE, Bucket
from rerank_fast.model.packed.graphs import ScoringGraphs
from rerank_fast.model.preparation import Preparer
from tests.model.packed.graph_stand_in import CallStandIn
from tests.model.packed.test_captured_families import few_heads, refusal
from tests.model.packed.test_encoder import MODELS, make_model, make_tokens

pytest.importorskip("triton")
PAIRS = [("what is a panda", "a bear"), ("panda", "the giant panda is a bear of China"), ("a", "b")]


@pytest.fixture
def model(still_bert: Path, through_triton: str, scoring_replays: list[CallStandIn]) -> Any:
    found = CrossEncoder(still_bert, device=through_triton)
    found.model.bert.encoder.layer = found.model.bert.encoder.layer[:1]  # type: ignore[union-attr]
    return found.eval()


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_one_copy_and_one_replay(name: str) -> None:
    """On meta tensors, where a copy or the read of a value in a capture is an error."""
    with torch.device("meta"):
        model = MODELS[name]().eval()
    prepare = Preparer(model, None, dtype=torch.bfloat16, captures=True)
    with (
        counting(np.ones(1, np.int64)) as counts,
        standing_in_for_graphs(counts),
        torch.inference_mode(),
    ):
        if refusal(name):
            with pytest.raises(ValueError, match=f"must be off here: {refusal(name)} can't be"):
                prepare(make_tokens([5]))
            return
        for lengths in ([5, 17, 33], [40, 9, 6]):
            counts.begin(str(lengths))
            prepare(make_tokens(lengths))(np.arange(3))
    tally = counts.phases[str(lengths)]
    assert (tally.uploads, tally.syncs, len(tally.replays)) == (1, 0, 1)
    assert tally.launches < 16


@pytest.mark.parametrize("name", ["modernbert-mean", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_replays_give_eager_scores(
    name: str,
    through_triton: str,
    scoring_replays: list[CallStandIn],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit those of the bucket run eagerly, but for rounding those of the pairs alone."""
    few_heads(monkeypatch, name)
    model = make_model(name).to(through_triton).eval()
    batches = [make_tokens(lengths, types=False) for lengths in ([3, 4], [9], [1, 2, 3])]

    def scores(**options: Any) -> list[torch.Tensor]:
        prepare = Preparer(model, None, **options)
        with torch.inference_mode():
            return [prepare(tokens)(np.arange(len(tokens))) for tokens in batches]

    actual = scores(captures=True)
    assert len(scoring_replays) == 1
    for found, expected in zip(actual, scores(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def eagerly(one: ScoringGraphs, *given: np.ndarray) -> torch.Tensor:
        bucket = Bucket.of(len(given[0]), len(given[3]) - 1, COARSE)
        values = one._encoder.layout.upload(bucket, *given)
        return one._encoder(bucket, values)[: len(given[3]) - 1]

    monkeypatch.setattr(ScoringGraphs, "__call__", eagerly)
    for found, expected in zip(actual, scores(captures=True), strict=True):
        assert torch.equal(found, expected)


def test_predict_replays_what_fits_and_follows_the_weights(
    model: CrossEncoder, scoring_replays: list[CallStandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.predict(PAIRS)
    model.capture_graphs()
    state = torch.get_rng_state()
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)  # scoring draws nothing
    assert model.predict([]).shape == (0,)
    assert len(scoring_replays) == 1
    first = model.predict(PAIRS[2])
    again = model.predict(PAIRS[:2])
    np.testing.assert_allclose([*again, first], expected, rtol=1e-5)
    made = len(scoring_replays)

    classifier: BertForSequenceClassification = model.model  # type: ignore[assignment]
    attention = classifier.bert.encoder.layer[0].attention.self
    with torch.no_grad():  # as an optimizer's step does
        attention.query.weight.add_(1.0)
        attention.value.bias.add_(1.0)
    changed = model.predict(PAIRS)
    assert len(scoring_replays) == made
    model.capture_graphs(False)
    np.testing.assert_allclose(changed, model.predict(PAIRS), rtol=1e-5)
    assert np.abs(changed - expected).max() > 1e-4

    model.capture_graphs()
    model.predict(PAIRS)
    made = len(scoring_replays)
    norm = classifier.bert.embeddings.LayerNorm
    norm.weight.data = 2 * norm.weight.data  # as .to() and load_state_dict(assign=True) do
    moved = model.predict(PAIRS)
    assert len(scoring_replays) == made + 1
    monkeypatch.setattr(graphs, "MOST_TOKENS", 2)  # of a batch: more are scored eagerly
    np.testing.assert_allclose(moved, model.predict(PAIRS), rtol=1e-5)
    assert np.abs(moved - changed).max() > 1e-4
    assert len(scoring_replays) == made + 1


def test_a_step_between_two_calls_and_other_modes_of_autograd(
    model: CrossEncoder, scoring_replays: list[CallStandIn]
) -> None:
    model.capture_graphs()
    before = model.predict(PAIRS)
    tokens = model.tokenize(PAIRS)
    with torch.no_grad():  # what was made in inference mode could not be written here
        prepared = model._captured.preparer(model)(tokens)  # type: ignore[union-attr]
        scores = prepared(np.arange(3))
    assert not scores.requires_grad
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.prepare(tokens)(np.arange(3)).sum().backward()
    optimizer.step()
    after = model.predict(PAIRS)
    assert np.abs(after - before).max() > 1e-4
    assert len(scoring_replays) == 1
    model.capture_graphs(False)
    np.testing.assert_allclose(after, model.predict(PAIRS), rtol=1e-5)


def test_many_threads_replay_one_after_the_other(
    model: CrossEncoder, scoring_replays: list[CallStandIn]
) -> None:
    batches = [PAIRS[:1], PAIRS[1:], PAIRS]
    expected = [model.predict(one) for one in batches]
    model.capture_graphs()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(model.predict, 3 * batches)
    for scores, wanted in zip(found, 3 * expected, strict=True):
        np.testing.assert_allclose(scores, wanted, rtol=1e-5)
    assert len(scoring_replays) <= 3


def test_buckets_that_were_not_asked_for_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_SCORING", 2)
    monkeypatch.setattr(graphs, "CudaGraph", CallStandIn)
    monkeypatch.setattr(graphs, "warm_up", lambda call, device: call())
    CallStandIn.made.clear()
    with torch.device("meta"):
        model = MODELS["bert"]().eval()
    prepare = Preparer(model, None, captures=True)
    lengths = [10], [64] * 4, [10], [64] * 16, [10], [64] * 4
    with torch.inference_mode():
        for one in lengths:
            prepare(make_tokens(one))(np.arange(len(one)))
    assert len(CallStandIn.made) == 4
    CallStandIn.made.clear()


def test_coarse_buckets_are_few() -> None:
    numbers = [(tokens, tokens // 90 + 1) for tokens in range(200, graphs.MOST_TOKENS, 50)]
    coarse, fine = ({Bucket.of(*one, digits) for one in numbers} for digits in (COARSE, FINE))
    assert len(coarse) < 50 < len(fine)
    for tokens, sequences in numbers:
        assert Bucket.of(tokens, sequences, COARSE).tokens < 1.35 * tokens + 64


def test_where_there_are_none_it_is_said(still_bert: Path, model: CrossEncoder) -> None:
    model.capture_graphs()
    twin = copy.deepcopy(model)  # which captures its own
    np.testing.assert_allclose(twin.predict(PAIRS), model.predict(PAIRS))
    with pytest.raises(ValueError, match="must be off where layers are compiled"):
        model.compile(backend="eager")
    model.capture_graphs(False)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="must be off where layers are compiled"):
        model.capture_graphs()
    twin.model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *given: None)
    with pytest.raises(ValueError, match="an adapter, a hook or int8 in a layer can't be capt"):
        twin.predict(PAIRS)


def test_a_cpu_has_none(still_bert: Path) -> None:
    with pytest.raises(ValueError, match="CUDA graphs need an NVIDIA GPU, got a model on cpu"):
        CrossEncoder(still_bert, device="cpu").capture_graphs()

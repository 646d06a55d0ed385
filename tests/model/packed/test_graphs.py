"""A step in buckets: what CUDA would capture is stood in for by what runs again over the same
buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.tools.gpu_counts import counting
from rerank_fast import CrossEncoder
from rerank_fast.model.packed import buckets, graphs
from rerank_fast.model.packed.buckets import FINE, Bucket
from rerank_fast.model.preparation import Preparer, prepare_packed
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.training.backward import Backward
from tests.model.packed.graph_stand_in import StandIn
from tests.training.conftest import config_for

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("replays")


def tiny(dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    options = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    config = BertConfig(
        vocab_size=11, max_position_embeddings=160, num_labels=1, pad_token_id=0, **sizes, **options
    )
    return BertForSequenceClassification(config).train()


def pairs(*lengths: int) -> TokenizedPairs:
    ids = np.random.default_rng(len(lengths)).integers(0, 11, sum(lengths)).astype(np.int32)
    return TokenizedPairs(ids, None, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters()}


def test_a_bucket_has_room_for_one_more_and_little_else():
    assert Bucket.of(3, 1, FINE) == Bucket(16, 4)
    assert Bucket.of(16, 3, FINE) == Bucket(32, 4)
    assert Bucket.of(10_400, 104, FINE) == Bucket(10_752, 108)
    for tokens in range(1000, 3000, 7):
        found = Bucket.of(tokens, tokens // 9, FINE)
        assert found.sequences > tokens // 9
        assert tokens + found.sequences - tokens // 9 <= found.tokens < 1.1 * tokens


@pytest.mark.parametrize(
    "batches", [[(3, 5)], pytest.param([(5, 2, 1), (9, 8)], marks=pytest.mark.slow)]
)
def test_what_fills_a_bucket_up_changes_nothing(
    batches: list[Any], through_triton: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one micro-batch, and of two, the later of which comes while activations of the first are
    still needed."""
    model = tiny().to(through_triton)
    tokens = pairs(*(length for batch in batches for length in batch))
    plan = np.split(np.arange(len(tokens)), np.cumsum([len(one) for one in batches])[:-1])

    def run(**options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        prepared = Preparer(model, None, **options)(tokens)
        scores = torch.cat([prepared(indices) for indices in plan])
        scores.square().sum().backward()
        return scores.detach(), gradients(model)

    expected, wanted = run()
    actual, found = run(graph_seed=7)
    assert len(StandIn.made) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    upload = buckets.upload

    def others(values: np.ndarray, device: torch.device) -> Tensor:
        """Other words where a loss should read none; products of other shapes would round
        otherwise."""
        num_tokens, bucket = filled.pop(0)
        values[num_tokens : bucket.tokens] = 3 + np.arange(bucket.tokens - num_tokens) % 7
        return upload(values, device)

    filled = [(sum(one), Bucket.of(sum(one), len(one), FINE)) for one in batches]
    monkeypatch.setattr(buckets, "upload", others)
    again, same = run(graph_seed=7)
    assert torch.equal(again, actual)
    assert all(torch.equal(same[name], found[name]) for name in found)


def test_a_bucket_drops_out_by_the_hosts_generator(through_triton: str) -> None:
    model = tiny(dropout=0.3).to(through_triton)
    prepare, tokens = Preparer(model, None, graph_seed=7), pairs(3, 2)
    scores = []
    for seed in (1, 1, 2):  # the first is captured, the second replayed
        torch.manual_seed(seed)
        model.zero_grad()
        prepared = prepare(tokens)
        scores.append(prepared(np.arange(2)))
        scores[-1].sum().backward()
        scores[-1] = torch.cat([scores[-1].detach(), gradients(model)["classifier.weight"][0]])
    assert len(StandIn.made) == 1
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_shapes_follow_from_the_bucket_and_no_value_is_read() -> None:
    """And those that were not asked for longest make room."""
    model = tiny(dropout=0.1).to("meta")
    prepare = Preparer(model, None, dtype=torch.bfloat16, graph_seed=7)

    def operations(*lengths: int) -> list[Any]:
        tokens = pairs(*lengths)
        with counting(tokens.lengths) as counts:
            counts.begin("all")
            prepared = prepare(tokens)
            prepared(np.arange(len(tokens))).sum().backward()
        tally = counts.phases["all"]
        assert (tally.syncs, tally.uploads) == (0, 1)
        return tally.operations

    operations(3, 5)  # captured here
    first, second = operations(3, 5), operations(1, 4, 2)
    names = [(one.name, one.launches, one.bytes) for one in first]
    # The head, outside, has as many rows as there are pairs.
    inside = [place for place, one in enumerate(first) if one.bytes == second[place].bytes]
    assert len(inside) > 0.8 * len(names)
    assert [one.name for one in first] == [one.name for one in second]
    assert len(StandIn.made) == 1
    for tokens in range(1, graphs.MOST_TRAINING + 1):
        operations(*[16 * tokens] * 7)
    assert len(StandIn.made) == 1 + graphs.MOST_TRAINING
    operations(*[16 * graphs.MOST_TRAINING] * 7)  # the last one is there still
    assert len(StandIn.made) == 1 + graphs.MOST_TRAINING
    operations(3, 5)
    assert len(StandIn.made) == 2 + graphs.MOST_TRAINING


def test_what_cannot_be_captured_is_refused(tmp_path: Path, still_bert: Path) -> None:
    model = tiny()
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *arguments: None)
    with pytest.raises(
        ValueError, match="CUDA graphs must be off here: an adapter, a hook or int8 in a layer"
    ):
        prepare_packed(model, pairs(3), graph_seed=1)
    with pytest.raises(ValueError, match="torch_compile must be off with cuda_graphs"):
        config_for(tmp_path, cuda_graphs=True, torch_compile=True)
    config: Any = config_for(tmp_path, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs needs an NVIDIA GPU, got a model on cpu"):
        Backward(CrossEncoder(still_bert, device="cpu"), config, None, None, None, 100)

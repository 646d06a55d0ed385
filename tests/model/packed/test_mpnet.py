"""MPNet: what of it is not as in other families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder

from rerank_fast import CrossEncoder, score
from rerank_fast.data.tokenized import tokenize_lists
from rerank_fast.model.packed.architectures import find_architecture, reason_to_pad
from rerank_fast.model.packed.heads import DenseHead
from rerank_fast.model.preparation import Preparer
from tests.model.packed.test_encoder import MODELS, make_model
from tests.model.test_gradient_cache import push
from tests.model_factory import make_tiny_mpnet
from tests.training.conftest import make_lists

PAIRS = [("what is the panda", doc) for doc in ("a kind of bear", "rain and wind", "", "sea " * 40)]
BIAS = "model.mpnet.encoder.relative_attention_bias.weight"


def test_the_bias_is_the_models_at_every_distance() -> None:
    """Beyond the farthest that is told apart too, in both directions."""
    model = make_model("mpnet")
    length = 200
    theirs = model.mpnet.encoder.compute_position_bias(torch.empty(1, length, 1))[0]
    terms = find_architecture(model).layers[0].relative
    slots = terms.slots(torch.device("cpu"))
    place, reach = torch.arange(length), len(slots) // 2
    distance = (place[:, None] - place[None, :]).clamp(-reach, reach)
    ours = terms.embeddings.weight[slots[distance + reach].long()]
    assert torch.equal(ours.permute(2, 0, 1), theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cached_gives_the_gradient_of_direct_with_dropout(
    tmp_path: Path, checkpointing: bool
) -> None:
    """Checkpointing too, which transformers refuses MPNet: packed layers need nothing of it."""
    path = make_tiny_mpnet(tmp_path)
    model, other = (CrossEncoder(path, device="cpu").train() for _ in range(2))
    lists = tokenize_lists(list(make_lists(6)), model)
    if checkpointing:
        other.gradient_checkpointing_enable()
        assert Preparer(other.model, other.tokenizer).recomputes
    expected, direct, drawn = push(model, lists, cached=False)
    found, cached, also_drawn = push(other, lists, cached=True)
    assert torch.equal(direct.scores, cached.scores)
    assert torch.equal(drawn, also_drawn)
    assert found.keys() == expected.keys()
    assert found[BIAS].abs().max() > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_saved_and_opened_again_by_both(tmp_path: Path) -> None:
    path = make_tiny_mpnet(tmp_path / "made")
    model = CrossEncoder(path, device="cpu")
    model.predict(PAIRS)  # what scoring keeps of the distances must serve a step with gradients
    assert not model.prepare(model.tokenize(PAIRS)).padded
    expected = PeerCrossEncoder(str(path), device="cpu").predict(PAIRS)
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=1e-5)
    score(model.train().prepare(model.tokenize(PAIRS))).sum().backward()
    model.eval().save_pretrained(tmp_path / "saved")
    for kind in (CrossEncoder, PeerCrossEncoder):
        again = kind(str(tmp_path / "saved"), device="cpu")
        np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-5)


def test_int8_is_near(tmp_path: Path) -> None:
    path = make_tiny_mpnet(tmp_path)
    exact = CrossEncoder(path, device="cpu").predict(PAIRS)
    near = CrossEncoder(path, device="cpu", dtype="int8").predict(PAIRS)
    assert not np.array_equal(near, exact)
    assert np.abs(near - exact).max() < 0.1 * (np.abs(exact).max() + np.ptp(exact))


def test_what_is_refused_says_why_and_the_head_is_fused() -> None:
    model = make_model("mpnet")
    assert isinstance(find_architecture(model).head, DenseHead)
    model.mpnet.encoder.relative_attention_bias.register_forward_hook(lambda *_: None)
    assert "encoder.relative_attention_bias has hooks" in reason_to_pad(model)
    few = MODELS["mpnet"](relative_attention_num_buckets=24)
    assert "the relative bias has 24 rows, of which distances name 32" in reason_to_pad(few)

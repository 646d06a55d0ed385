"""Dropout is off in every thread that scores, and each module's mode comes back after the last."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from rerank_fast.model import cross_encoder
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.eval_mode import EvalMode
from tests.model_factory import make_tiny_bert

PAIRS = [("panda", "bear"), ("rain", "sea and sun"), ("capital", "paris")]


@pytest.fixture
def model(tmp_path: Path) -> CrossEncoder:
    return CrossEncoder(str(make_tiny_bert(tmp_path)), device="cpu")


def test_a_thread_that_ends_leaves_the_others_without_dropout(
    model: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first begins in training mode, the second in its midst; the second runs when the first is
    done.
    """
    expected = model.predict(PAIRS)
    score, second_began, first_ended = cross_encoder.score, threading.Event(), threading.Event()

    def waiting(prepared, **options):
        if threading.current_thread().name == "first":
            second_began.wait(60)
        else:
            second_began.set()
            first_ended.wait(60)
        return score(prepared, **options)

    monkeypatch.setattr(cross_encoder, "score", waiting)
    model.train()
    scores = {}
    first, second = (
        threading.Thread(
            target=lambda name=name: scores.update({name: model.predict(PAIRS)}), name=name
        )
        for name in ("first", "second")
    )
    first.start()
    second.start()
    first.join()
    first_ended.set()
    second.join()
    for values in scores.values():
        np.testing.assert_array_equal(values, expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", ["predict", "rank"])
def test_many_calls_from_threads(model: CrossEncoder, method: str) -> None:
    def scores(_: int) -> list[float]:
        if method == "predict":
            return model.predict(PAIRS).tolist()
        return [hit["score"] for hit in model.rank("panda", [document for _, document in PAIRS])]

    expected = scores(0)
    model.train()
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(scores, range(64)))
    assert all(module.training for module in model.modules())


def test_modes_of_modules_come_back_after_an_error_too(
    model: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()
    model.model.bert.encoder.layer[0].eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    model.predict(PAIRS)
    assert [module.training for module in model.modules()] == modes

    def failing(step, **options):
        raise RuntimeError("no scores")

    monkeypatch.setattr(cross_encoder, "score", failing)
    with pytest.raises(RuntimeError, match="no scores"):
        model.predict(PAIRS)
    assert [module.training for module in model.modules()] == modes


def test_a_copy_is_scored_by_no_thread() -> None:
    module, mode = torch.nn.Linear(2, 1), EvalMode()
    with mode.of(module):
        copies = [copy.deepcopy(mode), pickle.loads(pickle.dumps(mode))]
        assert not module.training
    assert module.training
    for one in copies:
        with one.of(module):
            assert not module.training
        assert module.training

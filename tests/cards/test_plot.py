"""The plot of a run, read back as a PNG; and that it touches nothing of the caller's matplotlib."""

from __future__ import annotations

import importlib.util
import io
import logging

import numpy as np
import pytest

from rerank_fast.cards.plot import plot_run

ROWS = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-5 * step} for step in range(1, 41)]
ROWS += [
    {"step": step, "ndcg@10": 0.5 + step / 100, "base_ndcg@10": 0.5} for step in (10, 20, 30, 40)
]


def pixels(picture: bytes) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image", reason="the card extra is not installed")
    return image.imread(io.BytesIO(picture), format="png")


def has_color(picture: bytes, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixels(picture)[..., :3] * 255 - color).max(axis=-1) < 3).any())


def test_each_panel_that_has_values_is_drawn():
    pytest.importorskip("matplotlib", reason="the card extra is not installed")
    whole = plot_run(ROWS, metrics=["ndcg@10"], bases={"ndcg@10": 0.5}, best_step=40)
    assert whole is not None
    without_metric = plot_run(ROWS[:40])
    only_loss = plot_run([{"step": 1, "loss": 1.0}])
    assert without_metric is not None
    assert only_loss is not None
    heights = [pixels(picture).shape[0] for picture in (only_loss, without_metric, whole)]
    assert heights[0] < heights[1] < heights[2]
    assert has_color(whole, (0x00, 0x72, 0xB2))
    # The ring around the saved model is there for a step that was evaluated, and only then.
    other = plot_run(ROWS, metrics=["ndcg@10"], bases={"ndcg@10": 0.5}, best_step=39)
    assert other != whole
    # A later row of the same step counts: a resumed run logs it again.
    again = [*ROWS[:40], {"step": 40, "loss": 9.0, "learning_rate": 4e-4}]
    assert plot_run(again) != without_metric


def test_the_validation_loss_is_a_line_of_its_own_beside_the_training_loss():
    pytest.importorskip("matplotlib", reason="the card extra is not installed")
    validation = [{"step": step, "eval_loss": 1.5} for step in (0, 20, 40)]
    alone, both = plot_run(ROWS[:40]), plot_run([*ROWS[:40], *validation])
    assert alone is not None
    assert both is not None
    assert has_color(both, (0xD5, 0x5E, 0x00))
    assert not has_color(alone, (0xD5, 0x5E, 0x00))
    assert pixels(both).shape == pixels(alone).shape  # in the panel of the losses


def test_names_are_text_and_never_formulas():
    pytest.importorskip("matplotlib", reason="the card extra is not installed")
    name = r"$\badmacro{_{$ndcg@10"
    assert plot_run([{"step": 1, name: 0.5}, {"step": 2, name: 0.6}], metrics=[name]) is not None


def test_the_callers_figures_are_left_alone():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the card extra is not installed")
    import matplotlib

    pyplot.close("all")
    backend, settings = matplotlib.get_backend(), dict(matplotlib.rcParams)
    figure = pyplot.figure()
    plot_run(ROWS, metrics=["ndcg@10"])
    assert pyplot.get_fignums() == [figure.number]
    assert not figure.axes
    assert matplotlib.get_backend() == backend
    assert dict(matplotlib.rcParams) == settings
    pyplot.close("all")


def test_nothing_to_draw_or_nothing_to_draw_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    assert plot_run([]) is None
    assert plot_run([{"step": 1, "epoch": 0.1}], metrics=["ndcg@10"]) is None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    caplog.set_level(logging.WARNING)
    caplog.clear()
    assert plot_run(ROWS) is None
    assert [record.getMessage() for record in caplog.records] == [
        "No plot of the run: matplotlib is not installed (pip install 'rerank-fast[card]')."
    ]

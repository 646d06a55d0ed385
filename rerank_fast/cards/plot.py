"""The run as one picture: losses, learning rate and metric over steps."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rerank_fast.evaluation.reranking import LOSS

logger = logging.getLogger(__name__)

# Okabe and Ito's, for all eyes.
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
_GRAY = "#6b7280"


def plot_run(
    rows: Sequence[Mapping[str, Any]],
    *,
    metrics: Sequence[str] = (),
    bases: Mapping[str, float] | None = None,
    best_step: int | None = None,
) -> bytes | None:
    """A PNG with a panel each for loss, learning rate and metrics, as far as the rows hold them.

    Args:
        rows: of train_log.jsonl; a step that a resumed run repeated counts as it was the last time.
        metrics: names to draw; the first is the one that chose the saved model.
        bases: the first stage's value of a metric, drawn as a dotted line.
        best_step: of the saved model, marked in the last panel.

    Returns:
        The picture; None, and one line in the log, without matplotlib; None if there is nothing to
        draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning(
            "No plot of the run: matplotlib is not installed (pip install 'rerank-fast[card]')."
        )
        return None
    series = {name: _series(rows, name) for name in ("loss", LOSS, "learning_rate", *metrics)}
    drawn = [name for name in metrics if series[name]]
    panels = [name for name in ("loss", "learning_rate") if series[name]] + (
        ["metric"] if drawn else []
    )
    if not panels:
        return None
    # A Figure of its own, not pyplot's: no global state, no display, no font or style of the
    # caller's changed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    # Margins in inches; matplotlib's own layouts draw everything twice.
    below = 0.55 + (0.22 * math.ceil((len(drawn) + 2) / 2) if drawn else 0)
    height = 0.25 + 2.2 * len(panels) + below
    figure = Figure(figsize=(8, height), dpi=120)
    figure.subplots_adjust(
        left=0.1, right=0.98, top=1 - 0.25 / height, bottom=below / height, hspace=0.18
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        axis.grid(color="#e5e7eb", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if panel == "loss":
            _draw_loss(axis, series["loss"], series[LOSS])
        elif panel == "learning_rate":
            axis.plot(*_columns(series["learning_rate"]), color=_COLORS[0], linewidth=1.6)
            axis.set_ylim(bottom=0)
            axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            axis.set_ylabel("learning rate")
        else:
            _draw_metrics(axis, {name: series[name] for name in drawn}, bases or {}, best_step)
    axes[-1].set_xlabel("step", loc="right")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) in the order of steps."""
    return sorted(
        {row["step"]: float(row[name]) for row in rows if name in row and "step" in row}.items()
    )


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _draw_loss(
    axis: Any, points: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]
) -> None:
    steps, values = _columns(points)
    if len(values) < 20:
        axis.plot(
            steps,
            values,
            color=_COLORS[0],
            linewidth=1.6,
            marker="o",
            markersize=3,
            label="training",
        )
    else:
        axis.plot(steps, values, color=_COLORS[0], linewidth=0.8, alpha=0.35, label="training")
        window = max(5, len(values) // 20)
        smooth = [
            sum(part) / len(part)
            for i in range(len(values))
            for part in [values[max(0, i - window + 1) : i + 1]]
        ]
        label = f"training, mean of the last {window}"
        axis.plot(steps, smooth, color=_COLORS[0], linewidth=1.8, label=label)
    if validation:
        look = {"color": _COLORS[1], "linewidth": 1.6, "marker": "o", "markersize": 3}
        axis.plot(*_columns(validation), label="validation", **look)
    if validation or len(values) >= 20:
        axis.legend(loc="upper right", frameon=False, fontsize=8)
    axis.set_ylabel("loss")


def _draw_metrics(
    axis: Any,
    series: Mapping[str, Sequence[tuple[int, float]]],
    bases: Mapping[str, float],
    best_step: int | None,
) -> None:
    for i, (name, points) in enumerate(series.items()):
        color = _COLORS[i % len(_COLORS)]
        # A name is text, never a formula: matplotlib would read what stands between dollars as TeX.
        label = name.replace("$", r"\$")
        width = 2.0 if i == 0 else 1.2
        axis.plot(
            *_columns(points), color=color, linewidth=width, marker="o", markersize=3, label=label
        )
        if name in bases:
            axis.axhline(bases[name], color=color, linewidth=1, linestyle=":", alpha=0.8)
    first = dict(next(iter(series.values())))
    if best_step in first:
        axis.plot(
            [best_step],
            [first[best_step]],
            linestyle="none",
            marker="o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=_GRAY,
            markeredgewidth=1.6,
            label="saved model",
        )
    if bases:
        axis.plot([], [], color=_GRAY, linewidth=1, linestyle=":", label="first stage")
    axis.set_ylabel("metric")
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.22), frameon=False, fontsize=8, ncols=2)

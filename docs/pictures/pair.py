"""A pair's way from text to score."""

from __future__ import annotations

from colors import BLUE, GRAY, GREEN, INK, ORANGE, PALE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

QUERY = "How many people live in Berlin?"
DOCUMENT = "Berlin had 3.5 million people."
# As MiniLM's tokenizer cuts them; a test asks it.
_PIECES = "[CLS] how many people live in berlin ? [SEP] berlin had 3 . 5 million people . [SEP]"
TOKENS = _PIECES.split()
SEPARATOR = TOKENS.index("[SEP]")


def _down(axes: Axes, x: float, top: float, bottom: float) -> None:
    axes.add_patch(
        FancyArrowPatch(
            (x, top), (x, bottom), arrowstyle="-|>", mutation_scale=9, color=GRAY, linewidth=1
        )
    )


def _row(axes: Axes, y: float, label: str, note: str, *, read: int | None = None) -> None:
    """A cell for each token; where only one is read, the others give keys and values alone."""
    axes.text(-0.4, y + 0.28, label, ha="right", color=INK, weight="bold")
    axes.text(-0.4, y - 0.12, note, ha="right", color=GRAY, fontsize=8)
    for i in range(len(TOKENS)):
        full = read is None or i == read
        height = 0.6 if full else 0.2
        color = (BLUE if i <= SEPARATOR else GREEN) if full else PALE
        axes.add_patch(
            Rectangle((i + 0.08, y - (0.1 if full else -0.1)), 0.84, height, color=color, alpha=0.8)
        )


def draw() -> Figure:
    figure = Figure(figsize=(10, 4.6))
    axes = figure.subplots()
    axes.set(xlim=(-6.6, len(TOKENS) + 0.2), ylim=(-0.6, 7.4))
    axes.axis("off")

    for start, text, color in ((0, QUERY, BLUE), (SEPARATOR + 1, DOCUMENT, GREEN)):
        axes.text(start + 0.1, 6.85, text, color=color, weight="bold")
    axes.text(-0.4, 6.85, "text", ha="right", color=INK, weight="bold")
    axes.text(-0.4, 5.75, "tokens", ha="right", color=INK, weight="bold")
    axes.text(-0.4, 5.35, "ahead of the step, in a thread", ha="right", color=GRAY, fontsize=8)
    for i, token in enumerate(TOKENS):
        color = BLUE if i <= SEPARATOR else GREEN
        axes.add_patch(
            Rectangle((i + 0.05, 5.4), 0.9, 0.7, facecolor="white", edgecolor=color, linewidth=1)
        )
        axes.text(i + 0.5, 5.75, token, ha="center", va="center", fontsize=6.2, color=INK)
    middle = len(TOKENS) / 2
    _down(axes, middle, 6.75, 6.15)
    _row(axes, 4.2, "embeddings", "words, positions, types")
    _row(axes, 3.2, "layers 1 to L - 1", "attention within the pair, feed-forward")
    _row(axes, 2.2, "layer L", "keys and values of all, the rest of one", read=0)
    _down(axes, middle, 5.35, 4.8)
    _down(axes, middle, 4.05, 3.78)
    _down(axes, middle, 3.05, 2.5)
    _down(axes, 0.5, 2.05, 1.45)
    axes.add_patch(Rectangle((0.05, 0.75), 8.6, 0.65, color=ORANGE, alpha=0.85))
    axes.text(
        0.3, 1.07, "dense, activation, dropout, dot", va="center", color="white", weight="bold"
    )
    axes.text(-0.4, 1.12, "score head", ha="right", color=INK, weight="bold")
    axes.text(-0.4, 0.72, "one op, fp32 out", ha="right", color=GRAY, fontsize=8)
    _down(axes, 0.5, 0.7, 0.15)
    axes.text(0.05, -0.35, "score: one number for each pair", color=INK, weight="bold")
    return figure

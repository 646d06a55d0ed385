"""Three pairs of two lists, padded and packed."""

from __future__ import annotations

from itertools import accumulate, pairwise

from colors import BLUE, GRAY, GREEN, INK, ORANGE, PALE
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

LENGTHS = (7, 5, 11)  # tokens of pairs
PAIRS = (2, 1)  # of lists
COLORS = (BLUE, GREEN, ORANGE)
CU_SEQLENS = (0, *accumulate(LENGTHS))
OFFSETS = (0, *accumulate(PAIRS))


def draw() -> Figure:
    longest = max(LENGTHS)
    padding = len(LENGTHS) * longest - sum(LENGTHS)
    figure = Figure(figsize=(9, 4.2))
    axes = figure.subplots()
    axes.set(xlim=(-4.2, CU_SEQLENS[-1] + 1.2), ylim=(-2.5, 6.7))
    axes.axis("off")

    axes.text(-0.4, 5.1, "padded", ha="right", color=INK, weight="bold")
    share = f"{padding} of {len(LENGTHS) * longest} tokens\nare padding"
    axes.text(-0.4, 4.0, share, ha="right", color=GRAY, fontsize=8)
    for row, (length, color) in enumerate(zip(LENGTHS, COLORS, strict=True)):
        for i in range(longest):
            face = color if i < length else PALE
            axes.add_patch(Rectangle((i + 0.05, 5.4 - row), 0.9, 0.85, color=face, alpha=0.85))
        axes.text(longest + 0.4, 5.65 - row, f"pair {row}", color=color, weight="bold")

    axes.text(-0.4, 1.25, "packed", ha="right", color=INK, weight="bold")
    axes.text(-0.4, 0.8, "one run of tokens", ha="right", color=GRAY, fontsize=8)
    for number, (start, stop) in enumerate(pairwise(CU_SEQLENS)):
        for i in range(start, stop):
            axes.add_patch(Rectangle((i + 0.05, 0.85), 0.9, 0.85, color=COLORS[number], alpha=0.85))
        axes.text(
            (start + stop) / 2, 1.28, f"pair {number}", ha="center", va="center", color="white"
        )
    for at in CU_SEQLENS:
        axes.plot([at, at], [0.45, 1.8], color=INK, linewidth=1)
        axes.text(at, 0.05, str(at), ha="center", color=INK)
    axes.text(-0.4, 0.05, "cu_seqlens, of tokens", ha="right", color=INK)

    axes.text(-0.4, -1.45, "offsets, of documents", ha="right", color=INK)
    for q, (first, last) in enumerate(pairwise(OFFSETS)):
        left, right = CU_SEQLENS[first] + 0.1, CU_SEQLENS[last] - 0.1
        axes.plot([left, left, right, right], [-0.35, -0.6, -0.6, -0.35], color=GRAY, linewidth=1)
        axes.text((left + right) / 2, -1.1, f"list {q}", ha="center", color=GRAY)
    for document in OFFSETS:
        axes.text(CU_SEQLENS[document], -1.45, str(document), ha="center", color=INK)
    axes.text(
        0,
        -2.3,
        "scores (3,) and labels (3,): one of each pair, list after list",
        color=GRAY,
        fontsize=8,
    )
    return figure

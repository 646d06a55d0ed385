"""The demo's run, measured more often: MiniLM-L6 on documentation of installed packages."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from colors import BLUE, GRAY, ORANGE
from matplotlib.figure import Figure

COMMAND = "python docs/pictures/make.py curve --measure"
LISTS, HELD_OUT = 720, 80


def measure() -> dict[str, Any]:
    """The run's log: rows with loss and, where it was measured, NDCG@10 of held-out lists."""
    from rerank_fast import CrossEncoder, Trainer, TrainingConfig
    from rerank_fast.data.docstrings import build_docstring_lists
    from rerank_fast.demo import encoder_directory

    train, held_out = build_docstring_lists(num_random=9, max_lists=LISTS, max_words=40, seed=12)
    held_out = held_out.select(range(min(HELD_OUT, len(held_out))))
    with tempfile.TemporaryDirectory() as output:
        config = TrainingConfig(
            output=output,
            max_length=64,
            learning_rate=3e-4,
            freeze_layers=2,
            batch_size=8,
            max_docs_per_list=5,
            eval_steps=20,
            logging_steps=1,
            show_progress_bar=False,
        )
        model = CrossEncoder(encoder_directory(), max_length=64)
        result = Trainer(model, train, eval=held_out, config=config).train()
        log = Path(output, "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    return {
        "run": f"{len(train)} lists, {len(held_out)} held out of other modules, 8 lists a step",
        "loss": [[row["step"], round(row["loss"], 5)] for row in rows if "loss" in row],
        "ndcg@10": [[row["step"], round(row["ndcg@10"], 5)] for row in rows if "ndcg@10" in row],
        "bm25": round(result.metrics["base_ndcg@10"], 5),
        "best_step": result.best_step,
    }


def draw(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.2))
    left, right = figure.subplots(1, 2)
    steps, losses = zip(*figures["loss"], strict=True)
    left.plot(steps, losses, color=BLUE, linewidth=0.6, alpha=0.5)
    window = 9  # each point the mean of the steps around it, fewer at the ends
    smooth = [
        sum(near := losses[max(0, i - window // 2) : i + window // 2 + 1]) / len(near)
        for i in range(len(losses))
    ]
    left.plot(steps, smooth, color=BLUE, linewidth=1.8)
    left.set(xlabel="step", title="loss (NDCGLoss2++)", ylim=(0, None))
    steps, values = zip(*figures["ndcg@10"], strict=True)
    right.plot(steps, values, color=ORANGE, linewidth=1.8, marker="o", markersize=3.5)
    right.axhline(figures["bm25"], color=GRAY, linestyle=":", linewidth=1.4)
    right.text(0, figures["bm25"], "BM25", color=GRAY, va="bottom")
    best = dict(figures["ndcg@10"])[figures["best_step"]]
    right.plot(figures["best_step"], best, marker="o", markersize=9, fillstyle="none", color=GRAY)
    right.annotate(
        "saved",
        (figures["best_step"], best),
        (0, -16),
        textcoords="offset points",
        color=GRAY,
        ha="center",
    )
    right.set(xlabel="step", title="NDCG@10, held-out lists")
    right.margins(y=0.12)
    figure.subplots_adjust(wspace=0.25)
    return figure

"""What a model card shows of a run's results: metrics beside the first stage's, and the training
log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from rerank_fast.evaluation.evaluator import measured_sets
from rerank_fast.evaluation.reranking import LOSS
from rerank_fast.model.card import code, escape, hub_id, markdown_table

_MOST_ROWS = 1000
HELD_OUT = "held-out lists"  # a set without a name


def read_log(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = [
        json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def chosen_metrics(evaluators: Sequence[Any], metric_for_best: str) -> list[str]:
    """The metric that chose the model, then each set's own."""
    names = [metric_for_best] if evaluators else []
    for evaluator in evaluators:
        names += [one.primary_metric for one in measured_sets(evaluator)]
        names += [evaluator.primary_metric] if hasattr(evaluator, "primary_metric") else []
    return list(dict.fromkeys(names))


def base_of(name: str, metrics: Mapping[str, float]) -> str | None:
    """The first stage's metric beside one: base_ stands before it, after the evaluator's name."""
    places = [0, *(i + 1 for i, letter in enumerate(name) if letter == "_")]
    return next((key for i in places if (key := f"{name[:i]}base_{name[i:]}") in metrics), None)


def _with_gain(name: str, metrics: Mapping[str, float]) -> str:
    if name not in metrics:
        return "-"
    base = base_of(name, metrics)
    return f"{metrics[name]:.4f}" + (f" ({metrics[name] - metrics[base]:+.4f})" if base else "")


def evaluation_sections(
    evaluators: Sequence[Any], metrics: Mapping[str, float], dtype: str
) -> list[str]:
    """A table for each evaluator's sets, a column a set, and one for its mean over them.

    The gain over the first stage stands beside each value. The dtype is that of the arithmetic
    which gave the scores.
    """
    if not metrics:
        return []
    parts = [
        "## Evaluation",
        f"Scores were computed in {dtype}. In brackets the gain over the first stage's order, "
        "where there was one.",
    ]
    shown: set[str] = set()
    for evaluator in evaluators:
        for block in _blocks(evaluator):
            rows = []
            for metric in block.metrics:
                names = [prefixed(metric) for _, prefixed in block.columns]
                shown.update(names, *[[base_of(name, metrics) or name] for name in names])
                rows.append([code(metric), *(_with_gain(name, metrics) for name in names)])
            settings = json.dumps(block.settings, indent=4, default=str)
            parts += [
                f"### {escape(block.title)}",
                f"{block.queries:,} queries, evaluated with `{type(evaluator).__name__}` with "
                f"these parameters:\n\n```json\n{settings}\n```",
                markdown_table(["Metric", *(code(name) for name, _ in block.columns)], rows),
            ]
    others = [name for name in metrics if name not in shown]
    if others:
        values = [[code(name), f"{metrics[name]:.4f}"] for name in others]
        parts += ["### Further figures", markdown_table(["Metric", "Value"], values)]
    return parts


@dataclass(frozen=True)
class _Block:
    """What one table of an evaluator shows."""

    title: str
    queries: int
    settings: Mapping[str, Any]
    metrics: Sequence[str]
    # A name, and a metric's name in the results.
    columns: Sequence[tuple[str, Callable[[str], str]]]


def _blocks(evaluator: Any) -> list[_Block]:
    """The sets of one of this package's evaluators side by side, then its mean over them."""
    sets = measured_sets(evaluator)
    if not sets:
        return []
    queries = sum(len(one.candidates) for one in sets)
    settings = evaluator.get_config_dict()
    if hub_id(str(settings.get("dataset_id", ""))) is None:
        settings = {name: value for name, value in settings.items() if name != "dataset_id"}
    of_a_set = {
        name: settings[name] for name in ("at_k", "always_rerank_positives") if name in settings
    }
    columns = [(one.name or HELD_OUT, one.prefixed) for one in sets]
    blocks = [_Block(sets[0].description, queries, of_a_set, sets[0].metrics, columns)]
    if hasattr(evaluator, "sets"):
        mean = [(evaluator.name, f"{evaluator.name}_{{}}".format)]
        blocks.append(_Block(evaluator.description, queries, settings, sets[0].metrics, mean))
    return blocks


def eval_results(evaluators: Sequence[Any], metrics: Mapping[str, float]) -> list[EvalResult]:
    """The finite metrics of every set, and of the mean over sets, for the hub's metadata."""
    results = []
    for evaluator in evaluators:
        for block in _blocks(evaluator):
            for name, prefixed in block.columns:
                for metric in block.metrics:
                    value = metrics.get(prefixed(metric), math.nan)
                    if math.isfinite(value):
                        results.append(
                            EvalResult(
                                task_type=block.title.lower().replace(" ", "-"),
                                task_name=block.title,
                                dataset_type="held-out" if name == HELD_OUT else name,
                                dataset_name=name.replace("_", " "),
                                metric_type=metric,
                                metric_name=metric,
                                metric_value=value,
                            )
                        )
    return results


def metric_kinds(evaluators: Sequence[Any]) -> list[str]:
    """The metrics by their own names, for the hub's metadata."""
    sets = [one for evaluator in evaluators for one in measured_sets(evaluator)]
    return list(dict.fromkeys(metric for one in sets for metric in one.metrics))


def log_table(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    bases: Mapping[str, float],
    best_step: int,
) -> str:
    """One row for each step that logged anything, the saved model's in bold.

    Rows of step -1 are the model before training, where it was measured, and at the end the saved
    one.
    """
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    wanted = [metric for metric in metrics if any(metric in row for row in steps.values())]
    measured = [LOSS] if any(LOSS in row for row in steps.values()) else []
    untrained = steps.pop(0, None)
    kept, note = _thinned(steps, wanted, best_step)

    def cells(epoch: str, step: str, row: Mapping[str, Any]) -> list[str]:
        values = [
            _number(row, "loss", ".4f"),
            *(_number(row, name, ".4f") for name in measured),
            _number(row, "learning_rate", ".2e"),
        ]
        for metric in wanted:
            gained = metric in row and metric in bases
            gain = f" ({row[metric] - bases[metric]:+.4f})" if gained else ""
            values.append(_number(row, metric, ".4f") + gain)
        return [epoch, step, *values]

    lines = [] if untrained is None else [cells("-1", "-1", untrained)]
    for step in kept:
        line = cells(f"{steps[step].get('epoch', 0):.4f}", str(step), steps[step])
        saved = step == best_step
        lines.append([f"**{cell}**" if saved and cell != "-" else cell for cell in line])
    best = steps.get(best_step, {})
    saved_row = {name: best[name] for name in (*measured, *wanted) if name in best}
    if saved_row:
        lines.append(cells("-1", "-1", saved_row))
    header = [
        "Epoch",
        "Step",
        "Training loss",
        *["Validation loss"] * len(measured),
        "Learning rate",
    ]
    table = markdown_table([*header, *(code(metric) for metric in wanted)], lines)
    body = f"{table}\n\nThe bold row is the saved model."
    if saved_row:
        before = "the first row is the model before training, " if untrained is not None else ""
        body += f" Of step -1 {before}the last row the saved model."
    body += note
    if len(lines) > 40:
        title = f"{len(lines):,} rows; click to expand"
        body = f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
    return f"### Training log\n\n{body}"


def _thinned(
    steps: Mapping[int, Mapping[str, Any]], metrics: Sequence[str], best_step: int
) -> tuple[list[int], str]:
    """At most about a thousand steps: every evaluation, and of the others each nth."""
    order = sorted(steps)
    if len(order) <= _MOST_ROWS:
        return order, ""
    nth = math.ceil(len(order) / _MOST_ROWS)
    kept = [
        step
        for i, step in enumerate(order)
        if i % nth == 0 or step == best_step or any(metric in steps[step] for metric in metrics)
    ]
    return kept, f" Of {len(order):,} rows each {nth}th is shown, and every evaluation."


def _number(row: Mapping[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if name in row else "-"

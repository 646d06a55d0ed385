"""What a model card shows of a run's results: metrics beside the first stage's, and the training log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from rerank_fast.model.card import code, escape, markdown_table
from rerank_fast.training.config import TrainingConfig

_MOST_ROWS = 1000


def read_log(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def measured_sets(evaluator: Any) -> list[Any]:
    """The sets of queries of one of this package's evaluators; none for a function of the user's."""
    if hasattr(evaluator, "sets"):
        return list(evaluator.sets)
    return [evaluator.set] if hasattr(evaluator, "set") else []


def chosen_metrics(evaluators: Sequence[Any], config: TrainingConfig) -> list[str]:
    """The metric that chose the model, then each set's own."""
    names = [config.metric_for_best] if evaluators else []
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


def evaluation_sections(evaluators: Sequence[Any], metrics: Mapping[str, float], dtype: str) -> list[str]:
    """A table for each evaluator: a column a set, a row a metric, the gain over the first stage beside it.

    The dtype is that of the arithmetic which gave the scores.
    """
    if not metrics:
        return []
    parts = [
        "## Evaluation",
        f"Scores were computed in {dtype}. In brackets the gain over the first stage's order, where there was one.",
    ]
    shown: set[str] = set()
    for evaluator in evaluators:
        sets = measured_sets(evaluator)
        if not sets:
            continue
        columns = [(one.name or "held-out lists", one.prefixed) for one in sets]
        if hasattr(evaluator, "sets"):
            columns.append((evaluator.name, f"{evaluator.name}_{{}}".format))
        rows = []
        for metric in sets[0].metrics:
            names = [prefixed(metric) for _, prefixed in columns]
            shown.update(names, *[[base_of(name, metrics) or name] for name in names])
            rows.append([code(metric), *(_with_gain(name, metrics) for name in names)])
        parts.append(f"### {escape(evaluator.description)}")
        settings = {key: value for key, value in evaluator.get_config_dict().items() if key != "dataset_id"}
        parts.append(f"{sum(len(one.candidates) for one in sets):,} queries; {code(json.dumps(settings))}")
        parts.append(markdown_table(["Metric", *(code(name) for name, _ in columns)], rows))
    others = [name for name in metrics if name not in shown]
    if others:
        parts.append(markdown_table(["Metric", "Value"], [[code(n), f"{metrics[n]:.4f}"] for n in others]))
    return parts


def eval_results(evaluators: Sequence[Any], metrics: Mapping[str, float]) -> list[EvalResult]:
    results = []
    for evaluator in evaluators:
        for one in measured_sets(evaluator):
            for metric in one.metrics:
                value = metrics.get(one.prefixed(metric), math.nan)
                if math.isfinite(value):
                    results.append(
                        EvalResult(
                            task_type="cross-encoder-reranking",
                            task_name=evaluator.description,
                            dataset_type=one.name or "held-out",
                            dataset_name=one.name or "held-out lists",
                            metric_type=metric,
                            metric_name=metric,
                            metric_value=value,
                        )
                    )
    return results


def log_table(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], bases: Mapping[str, float], best_step: int
) -> str:
    """One row for each step that logged anything, the saved model's in bold."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    wanted = [metric for metric in metrics if any(metric in row for row in steps.values())]
    kept, note = _thinned(steps, wanted, best_step)
    lines = []
    for step in kept:
        row = steps[step]
        cells = [
            f"{row.get('epoch', 0):.4f}",
            str(step),
            _number(row, "loss", ".4f"),
            _number(row, "learning_rate", ".2e"),
        ]
        for metric in wanted:
            gain = f" ({row[metric] - bases[metric]:+.4f})" if metric in row and metric in bases else ""
            cells.append(_number(row, metric, ".4f") + gain)
        lines.append([f"**{cell}**" if step == best_step and cell != "-" else cell for cell in cells])
    table = markdown_table(
        ["Epoch", "Step", "Training loss", "Learning rate", *(code(metric) for metric in wanted)], lines
    )
    body = f"{table}\n\nThe bold row is the saved model.{note}"
    if len(lines) > 40:
        body = f"<details><summary>{len(lines):,} rows; click to expand</summary>\n\n{body}\n\n</details>"
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

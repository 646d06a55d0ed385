"""The model card of a training run: what was trained, on what, how, and what came of it."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from rerank_fast import __version__
from rerank_fast.cards.energy import Energy, EnergyMeter
from rerank_fast.cards.lists import Described, describe_lists
from rerank_fast.cards.plot import plot_run
from rerank_fast.cards.record import Change, RunRecord
from rerank_fast.cards.results import (
    base_of,
    chosen_metrics,
    eval_results,
    evaluation_sections,
    log_table,
    metric_kinds,
    read_log,
)
from rerank_fast.data.lists import ListStream
from rerank_fast.evaluation.evaluator import measured_sets
from rerank_fast.model.card import (
    PLOT_FILE,
    base_model_link,
    code,
    details,
    escape,
    html_code,
    hub_id,
    make_card,
    sources_and_architecture,
    title,
    usage,
)
from rerank_fast.model.precision.hardware import name_of
from rerank_fast.objectives.base import Objective

if TYPE_CHECKING:
    from rerank_fast.model.cross_encoder import CrossEncoder

logger = logging.getLogger(__name__)

# Where a run wrote, and how it showed itself, is nobody's business but its owner's.
_PRIVATE = ("output", "overwrite", "show_progress_bar")
_SENTENCE_TRANSFORMERS = """@inproceedings{reimers-2019-sentence-bert,
    title = {Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks},
    author = {Reimers, Nils and Gurevych, Iryna},
    booktitle = {Proceedings of the 2019 Conference on
                 Empirical Methods in Natural Language Processing},
    month = {11},
    year = {2019},
    publisher = {Association for Computational Linguistics},
    url = {https://arxiv.org/abs/1908.10084}
}"""


class RunCard:
    """Gathers over a run what its card says: made with its lists, started and finished with it.

    Args:
        lists: the training lists, as `load_lists` gives them, or a stream of such rows.
        sources: where they come from: hub ids, files or directories.
        eval_sources: where the evaluation lists come from.
    """

    def __init__(
        self,
        lists: Dataset | ListStream,
        sources: Sequence[str] = (),
        eval_sources: Sequence[str] = (),
    ) -> None:
        self.lists = describe_lists(lists)
        self.sources = list(sources)
        self.eval_sources = list(eval_sources)
        self.meter = EnergyMeter()
        self.energy: Energy | None = None
        self.changes: list[Change] = []

    def start(
        self,
        model: CrossEncoder,
        output: Path,
        *,
        step: int,
        energy: Energy | None,
        changes: list[Change],
    ) -> None:
        """From here on the model is another one than that of the card it came with.

        Args:
            model: that is trained.
            output: of the run.
            step: that it goes on from, 0 for a fresh one.
            energy: that it has taken up to there, where that was measured.
            changes: of settings, where it was resumed.
        """
        model.card = None
        self.changes = changes
        (output / PLOT_FILE).unlink(missing_ok=True)
        if energy is not None:
            self.meter.start(energy)
        elif not step:  # of a run whose first part was not measured, the rest would be too little
            self.meter.start()

    def close(self) -> None:
        """Stop measuring; finish() says what was measured."""
        self.energy = self.meter.stop() or self.energy

    def finish(self, run: RunRecord) -> None:
        """Write README.md and the plot beside the model that the run saved; what goes wrong is
        logged.

        The model is saved: neither a full disk nor a value that the hub's metadata refuse must end
        its run.
        """
        self.close()
        try:
            self._write(run)
        except (OSError, ValueError) as error:
            logger.error("can't write the model card to %s: %s", run.output, error)

    def _write(self, run: RunRecord) -> None:
        energy = self.energy
        model, output, evaluators = run.model, run.output, run.evaluators
        rows = read_log(output / "train_log.jsonl")
        metrics = chosen_metrics(evaluators, run.metric_for_best)
        bases = {
            name: run.metrics[base] for name in metrics if (base := base_of(name, run.metrics))
        }
        plot = plot_run(rows, metrics=metrics, bases=bases, best_step=run.best_step)
        name = output.resolve().name
        losses = list(dict.fromkeys(map(_class_name, run.objective.parts)))
        sample = self.lists.samples[0]
        datasets = [source for source in self.sources if hub_id(source) and "/" in source]
        sections = [
            f"# {escape(title(model))}",
            _first_sentence(model, self.lists, losses),
            details(model),
            sources_and_architecture(model),
            usage(
                name,
                sample["query"],
                [doc for doc in sample["docs"][:3] if doc.strip()] or [sample["query"]],
            ),
            *evaluation_sections(evaluators, run.metrics, name_of(run.evaluated_in)),
            *_data(self.lists, self.sources, evaluators, self.eval_sources),
            _loss(run),
            _hyperparameters(run, self.changes),
            log_table(rows, metrics, bases, run.best_step),
            *(
                [f"![Loss, learning rate and metric over the steps of the run]({PLOT_FILE})"]
                if plot
                else []
            ),
            _environment(run, energy),
            _versions(),
            _citations(run.objective),
        ]
        card = make_card(
            model,
            name,
            sections,
            tags=[
                "generated_from_trainer",
                *([] if self.lists.size is None else [f"dataset_size:{self.lists.size}"]),
                *(f"loss:{loss}" for loss in losses),
            ],
            plot=plot,
            datasets=datasets or None,
            co2_eq_emissions=None if energy is None else _emissions(energy, run),
            model_name=title(model),
            metrics=metric_kinds(evaluators) or None,
            eval_results=eval_results(evaluators, run.metrics) or None,
        )
        card.write(output)
        if run.holds_the_saved_model:
            model.card = card


def _class_name(objective: Objective) -> str:
    return type(objective).__name__


def _first_sentence(model: CrossEncoder, lists: Described, losses: Sequence[str]) -> str:
    size = "a stream of" if lists.size is None else f"{lists.size:,}"
    return (
        f"This is a cross-encoder, fine-tuned from {base_model_link(model.name_or_path)} on "
        f"{size} ranking lists with {' and '.join(losses)} by rerank_fast. It reads a query and a "
        "document together and gives a score to rerank by, and loads in rerank_fast, "
        "sentence-transformers and transformers."
    )


def _data(
    lists: Described,
    sources: Sequence[str],
    evaluators: Sequence[Any],
    eval_sources: Sequence[str] = (),
) -> list[str]:
    parts = ["## Training details", "### Training data", _named(sources)]
    parts.append(lists.to_markdown("training"))
    sets = [one for evaluator in evaluators for one in measured_sets(evaluator)]
    if sets:
        parts.append("### Evaluation data")
        if eval_sources:
            parts.append(_named(eval_sources))
    for one in sets:
        rows = [{"query": c.query, "docs": c.docs, "labels": c.labels} for c in one.candidates]
        described = describe_lists(rows).to_markdown("evaluation")
        name = html_code(one.name or "held-out lists")
        parts.append(
            f"<details><summary>{name}: {len(rows):,} lists</summary>\n\n{described}\n\n</details>"
        )
    return parts


def _named(sources: Sequence[str]) -> str:
    return ", ".join(map(_source, sources)) or "An unnamed dataset."


def _source(source: str) -> str:
    if hub_id(source) and "/" in source:
        return f"[{escape(source)}](https://huggingface.co/datasets/{source})"
    return code(Path(source).name)


def _loss(run: RunRecord) -> str:
    # Whatever the model applies to its scores afterwards: the loss is of the raw ones.
    scored = {
        "mini_batch_size": run.settings["mini_batch_size"],
        "activation_fn": "torch.nn.modules.linear.Identity",
    }
    text = json.dumps({**run.objective.describe(), **scored}, indent=4, default=str)
    return (
        f"### Loss\n\n`{_class_name(run.objective)}` with these parameters:\n\n```json\n{text}\n```"
    )


def _hyperparameters(run: RunRecord, changes: Sequence[Change]) -> str:
    values = {name: value for name, value in run.settings.items() if name not in _PRIVATE}
    # "auto" has become what it is: of the precision that depends on the machine, so it is always
    # shown.
    default = {**run.defaults, "sharding": "none"}
    changed = {name: value for name, value in values.items() if value != default[name]}

    def listed(some: Mapping[str, Any]) -> str:
        return "\n".join(f"- `{name}`: {_setting(value)}" for name, value in some.items())

    return "\n\n".join(
        [
            "### Hyperparameters",
            "#### Other than the defaults",
            listed(changed) or "None.",
            "#### All",
            # What was left to the machine is what it came to.
            "<details><summary>Click to expand</summary>\n\n"
            + listed({**values, "max_tokens_per_microbatch": run.max_tokens_per_microbatch})
            + "\n\n</details>",
            *([_changed(changes)] if changes else []),
        ]
    )


def _changed(changes: Sequence[Change]) -> str:
    lines = [
        f"- `{one.name}`: {_setting(one.before)} up to step {one.step}, then {_setting(one.now)}"
        for one in changes
    ]
    return "\n".join(
        ["#### Changed where the run was resumed; above are the last values", "", *lines]
    )


def _setting(value: Any) -> str:
    """A setting's value; of a path only its last part."""
    if isinstance(value, str | Path):
        value = Path(value).name if Path(value).is_absolute() else str(value)
    return code(value, 200) if isinstance(value, str) else escape(str(value), 200)


def _environment(run: RunRecord, energy: Energy | None) -> str:
    device = run.model.device
    gpu = (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
        if device.type == "cuda"
        else "none used"
    )
    early = "" if run.steps == run.num_steps else f" of {run.num_steps:,}, ended early"
    lines = [
        "### Environment",
        "",
        f"- **Training time:** {_hours(run.seconds - run.evaluation_seconds)}",
        f"- **Evaluation time:** {_hours(run.evaluation_seconds)}",
        f"- **Total time:** {_hours(run.seconds)}",
        f"- **Steps:** {run.steps:,}{early}",
        f"- **Processes:** {run.num_processes}",
    ]
    if energy is None:
        lines.append(
            "- **Energy and carbon:** not measured; codecarbon is not installed or gave no figures"
        )
    else:
        grid = (
            f"on the grid of {escape(energy.country)}"
            if energy.country
            else "at the world's mean of grids"
        )
        lines.append(
            f"- **Energy:** {energy.kwh:.4g} kWh, as codecarbon estimates it for the machine"
        )
        lines.append(f"- **Carbon:** {energy.kg_co2:.4g} kg of CO2-equivalent, {grid}")
        lines.append(f"- **On cloud:** {'yes' if energy.on_cloud else 'no'}, as codecarbon sees it")
    lines.append(f"- **GPU:** {escape(gpu)}")
    cpu = energy.cpu_model if energy and energy.cpu_model else _cpu_model()
    lines.append(f"- **CPU:** {escape(cpu)}; PyTorch's threads: {torch.get_num_threads()}")
    if energy is not None:
        lines.append(f"- **RAM:** {energy.ram_gib:.1f} GiB")
    return "\n".join(lines)


def _emissions(energy: Energy, run: RunRecord) -> dict[str, Any]:
    """The hub's metadata; emissions in grams."""
    device = run.model.device
    return {
        "emissions": energy.kg_co2 * 1000,
        "energy_consumed": energy.kwh,
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "cpu_model": energy.cpu_model,
        "ram_total_size": energy.ram_gib,
        "on_cloud": energy.on_cloud,
        "hours_used": round(run.seconds / 3600, 3),
        **({"hardware_used": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
    }


def _hours(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.2f} hours"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions() -> str:
    lines = [f"- Python: {platform.python_version()}", f"- rerank_fast: {__version__}"]
    for label, package in {
        "Transformers": "transformers",
        "PyTorch": "torch",
        "Triton": "triton",
        "Accelerate": "accelerate",
        "Datasets": "datasets",
        "Tokenizers": "tokenizers",
        "Sentence Transformers": "sentence-transformers",
    }.items():
        try:
            lines.append(f"- {label}: {version(package)}")
        except PackageNotFoundError:
            continue
    return "\n".join(["### Framework versions", "", *lines])


def _citations(objective: Objective) -> str:
    parts = ["## Citation"]
    entries = {_class_name(one): one.citation.strip() for one in objective.parts if one.citation}
    for name, entry in {**entries, "Sentence Transformers": _SENTENCE_TRANSFORMERS}.items():
        parts.append(f"### {name}\n\n```bibtex\n{entry}\n```")
    return "\n\n".join(parts)

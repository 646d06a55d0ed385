"""rerank-fast train: a run from flags, a YAML file or a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from rerank_fast.cli.evaluate import print_metrics
from rerank_fast.cli.lists import LISTS, Source, add_columns, lists_of, refuse
from rerank_fast.cli.parser import CommandParser, command_parser
from rerank_fast.training.config import LAMBDA_LOSS, TrainingConfig

# What is of a start and not of the run: beside a recipe too these are flags.
_OF_A_START = ("overwrite", "resume", "resume_changed")
_BESIDE_RECIPE = ("recipe", "set", "push", "dry_run", *_OF_A_START)
_DEFAULTS = TrainingConfig()
# In which --help shows the settings.
_GROUPS = {
    "run": ["recipe", "set", "dry_run", "resume", "resume_changed", "seed"],
    "data": [
        "train",
        "eval",
        "columns",
        "labels",
        "max_docs_per_list",
        "in_batch_negatives",
        "streaming",
        "shuffle_buffer",
    ],
    "model": [
        "model",
        "max_length",
        "precision",
        "gradient_checkpointing",
        "torch_compile",
        "cuda_graphs",
        "freeze_layers",
        "freeze",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
    ],
    "batch and memory": [
        "batch_size",
        "gradient_accumulation_steps",
        "gradient_cache",
        "skip_below",
        "mini_batch_size",
        "max_tokens_per_microbatch",
        "sharding",
        "distributed_timeout",
    ],
    "loss": [
        "objective",
        "objective_options",
        "scheme",
        "k",
        "sigma",
        "mu",
        "eps",
        "reduction_log",
        "reduction",
    ],
    "optimizer and schedule": [
        "num_epochs",
        "max_steps",
        "learning_rate",
        "warmup_ratio",
        "warmup_steps",
        "schedule",
        "schedule_options",
        "optimizer",
        "optimizer_options",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "weight_decay",
        "layer_lr_decay",
        "max_grad_norm",
        "ema_decay",
    ],
    "evaluation": [
        "eval_on_start",
        "eval_steps",
        "metric_for_best",
        "load_best",
        "early_stopping_patience",
        "stop_on_collapse",
    ],
    "output": [
        "output",
        "overwrite",
        "push",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "trackers",
        "show_progress_bar",
    ],
}


class _TrainParser(CommandParser):
    def dump(self, namespace: Any, **options: Any) -> str:
        """Of a run by recipe only what was given: the rest are the recipe's settings, not these."""
        if namespace.get("recipe") is not None:
            options["skip_default"] = True
        return super().dump(namespace, **options)


def make_parser() -> CommandParser:
    parser = command_parser(
        "Fine-tune a reranker on ranking lists.",
        _TrainParser,
        usage=(
            "train --model MODEL --train LISTS [--eval LISTS] [options]\n"
            "train --recipe NAME [--set KEY=VALUE ...]"
        ),
        examples=(
            "rerank-fast train --model microsoft/MiniLM-L12-H384-uncased \\\n"
            "  --train train.jsonl --eval eval.jsonl --output my-reranker\n"
            "rerank-fast train --recipe own-lists-lambdaloss --set lists=train.jsonl\n"
            "rerank-fast train --config run.yaml --resume"
        ),
    )
    _add_sources(parser)
    _add_start(parser)
    parser.add_class_arguments(TrainingConfig, skip={*_OF_A_START, "trackers"})
    parser.set_defaults({"show_progress_bar": sys.stderr.isatty()})
    parser.finish(_GROUPS)
    return parser


def _add_sources(parser: CommandParser) -> None:
    """What is trained, and on what: by name, or piece by piece."""
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help="a whole run by name; see rerank-fast recipes",
    )
    parser.add_argument(
        "--set",
        type=str,
        nargs="+",
        action="extend",
        default=None,
        help="key=value ... in place of the recipe's own",
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="directory or hub id of an encoder or reranker",
    )
    parser.add_argument("--train", type=Source | None, default=None, help=LISTS)
    parser.add_argument(
        "--eval", type=Source | None, default=None, help="lists to choose the best model by"
    )
    add_columns(parser)
    parser.add_argument(
        "--labels",
        type=Literal["relevance", "scores"],
        default="relevance",
        help="of --train, where its rows have both: labels, or a teacher's scores for distillation",
    )


def _add_start(parser: CommandParser) -> None:
    """What is said of one start, and stands in no recipe."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="read and count all lists, say what the run would do, write nothing",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that output already holds"
    )
    parser.add_argument(
        "--push",
        type=str | None,
        default=None,
        help="hub repository (user/name) for the trained model and its card; made private where it "
        "is not there",
    )
    parser.add_argument(
        "--resume",
        type=str,
        nargs="?",
        const="auto",
        default="never",
        help="go on from the newest checkpoint in output, if there is one (auto, or nothing after "
        "it), or from a checkpoint's path",
    )
    parser.add_argument(
        "--resume_changed",
        action="store_true",
        help="go on also with other settings or lists than the interrupted run's; the card tells "
        "the change",
    )
    parser.add_argument(
        "--trackers",
        type=list[str] | str,
        default=[],
        help="where the log goes beside train_log.jsonl: tensorboard, or several as in "
        "tensorboard,wandb",
    )


def check(
    options: Mapping[str, Any],
    given: Collection[str],
    usage: Callable[[str], object],
) -> None:
    """Refuse a run without a model or lists, and a setting that would not be applied.

    Args:
        options: all settings of the command.
        given: those that the command line or its YAML file names.
        usage: ends the command with what it is to be told.
    """
    if options["recipe"] is None:
        if None in (options["model"], options["train"]):
            usage("train needs --model and --train, or --recipe")
        if options["set"]:
            raise ValueError("--set overrides a recipe: it needs --recipe")
        return
    beside = [name for name in given if name not in (*_BESIDE_RECIPE, "config")]
    if beside:
        flags = ", ".join(f"--{name}" for name in beside)
        raise ValueError(f"with --recipe, settings go as --set {beside[0]}=...; got {flags}")


def spelled(options: Mapping[str, Any]) -> dict[str, str]:
    """How each setting is typed: as a flag, beside a recipe as --set key=value."""
    flags = {name: f"--{name}" for name in options}
    if options.get("recipe") is None:
        return flags
    from rerank_fast.recipes import Recipe

    keys = {*options, *(field.name for field in fields(Recipe))} - {*_BESIDE_RECIPE, "training"}
    return flags | {name: f"--set {name}" for name in keys}


def run(options: dict[str, Any]) -> None:
    trainer = _trainer(options) if options["recipe"] is None else _recipe_trainer(options)
    if options["dry_run"]:
        from rerank_fast.training.dry_run import describe

        lines = describe(trainer)
        if options["push"] is not None:
            lines.append(f"Would push to {options['push']}")
        trainer.processes.destroy_process_group()
        if trainer.processes.is_main_process:
            print(*lines, "Nothing was trained or written.", sep="\n")
        return
    if options["push"] is not None:
        # One that can't be made is known before hours of training, but no wrong path makes one.
        from rerank_fast.model.storage import create_repository

        create_repository(options["push"], private=True, token=None)
    from rerank_fast.training.events import TrainingInterrupted

    # The group's threads would abort a process that exits before they are done. After an error the
    # other processes may never come to this.
    try:
        result = trainer.train()
    except TrainingInterrupted:
        trainer.processes.destroy_process_group()
        raise
    trainer.processes.destroy_process_group()
    if not trainer.processes.is_main_process:
        return
    print(
        f"{result.steps} steps in {result.seconds:.0f} s; model of step {result.best_step} saved "
        f"to {result.output}"
    )
    if result.metrics:
        print_metrics(result.metrics)
    if options["push"] is not None:
        from rerank_fast.model.cross_encoder import CrossEncoder

        print(CrossEncoder(result.output, device="cpu").push_to_hub(options["push"]))


def _refuse_unused(config: TrainingConfig) -> None:
    settings, defaults = vars(config), vars(_DEFAULTS)
    if not config.lora_rank:
        names = ["lora_alpha", "lora_dropout", "lora_target_modules"]
        refuse(settings, defaults, names, "lora_rank is 0")
    if not config.streaming:
        refuse(settings, defaults, ["shuffle_buffer"], "streaming is off")
    if config.objective != "lambda_loss":
        refuse(settings, defaults, LAMBDA_LOSS, f"objective is {config.objective}")
    elif config.scheme != "ndcg2pp":
        refuse(settings, defaults, ["mu"], f"scheme is {config.scheme}")
    if config.gradient_cache == "off":
        refuse(settings, defaults, ["skip_below"], "gradient_cache is off")
    if config.resume == "never":
        refuse(settings, defaults, ["resume_changed"], "resume is never")


def _recipe_trainer(options: dict[str, Any]) -> Any:
    from rerank_fast.recipes import load_recipe

    recipe = load_recipe(options["recipe"], options["set"] or [])
    given = {name: options[name] for name in _OF_A_START}
    flags = {name: value for name, value in given.items() if value != vars(_DEFAULTS)[name]}
    flags["show_progress_bar"] = recipe.training.show_progress_bar and sys.stderr.isatty()
    recipe = replace(recipe, training=replace(recipe.training, **flags))
    _refuse_unused(recipe.training)

    from rerank_fast.recipes.building import build_trainer

    return build_trainer(recipe)


def _trainer(options: dict[str, Any]) -> Any:
    model, train, evaluation = (options[name] for name in ("model", "train", "eval"))
    columns, labels = options["columns"], options["labels"]
    names = {field.name for field in fields(TrainingConfig)}
    if isinstance(options["trackers"], str):
        trackers = [name.strip() for name in options["trackers"].split(",")]
        options = {**options, "trackers": trackers}
    # A wrong value is said before torch is imported.
    config = TrainingConfig(**{name: value for name, value in options.items() if name in names})
    _refuse_unused(config)
    if evaluation is None:
        why = "nothing is evaluated, it needs --eval"
        refuse(vars(config), vars(_DEFAULTS), ["metric_for_best"], why)

    from rerank_fast.data.lists import ListStream, names_of
    from rerank_fast.training.trainer import Trainer

    trainer = Trainer(
        model,
        ListStream(train, columns=columns, labels=labels)
        if config.streaming
        else lists_of(train, columns, labels),
        eval=evaluation and lists_of(evaluation, columns),
        config=config,
    )
    trainer.card.eval_sources = [] if evaluation is None else names_of(evaluation)
    # What lists_of has read here no longer says where it came from.
    trainer.card.sources = names_of(train)
    return trainer

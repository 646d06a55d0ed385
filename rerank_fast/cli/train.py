"""rerank-fast train: a run from flags, a YAML file or a recipe."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from rerank_fast.cli.evaluate import print_metrics
from rerank_fast.cli.lists import add_columns, lists_of
from rerank_fast.training.config import TrainingConfig


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Fine-tune a reranker on ranking lists with LambdaLoss.")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these settings")
    parser.add_argument(
        "--recipe", type=str | None, default=None, help="a whole run by name; see rerank-fast recipes"
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
        "--model", type=str | None, default=None, help="directory or hub id of an encoder or reranker"
    )
    parser.add_argument(
        "--train", type=str | None, default=None, help="lists: .jsonl, .parquet, saved dataset or hub id"
    )
    parser.add_argument("--eval", type=str | None, default=None, help="lists to choose the best model by")
    add_columns(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a model that output already holds")
    parser.add_argument(
        "--push",
        type=str | None,
        default=None,
        help="hub repository (user/name) for the trained model and its card; made private where it is not there",
    )
    parser.add_argument(
        "--resume",
        type=str,
        nargs="?",
        const="auto",
        default="never",
        help="go on from the newest checkpoint in output, if there is one (auto, or nothing after it), or from a "
        "checkpoint's path",
    )
    parser.add_argument(
        "--resume_changed",
        action="store_true",
        help="go on also with other settings or lists than the interrupted run's; the card tells the change",
    )
    parser.add_argument(
        "--trackers",
        type=list[str] | str,
        default=[],
        help="where the log goes beside train_log.jsonl: tensorboard, or several as in tensorboard,wandb",
    )
    parser.add_class_arguments(TrainingConfig, skip={"overwrite", "resume", "resume_changed", "trackers"})
    return parser


def run(options: dict[str, Any]) -> None:
    if options["push"] is not None:  # a repository that can't be made is known before hours of training
        from rerank_fast.model.storage import create_repository

        create_repository(options["push"], private=True, token=None)
    from rerank_fast.training.events import TrainingInterrupted

    trainer = _recipe_trainer(options) if options["recipe"] is not None else _trainer(options)
    # The group's threads would abort a process that exits before they are done. After an error the other processes
    # may never come to this.
    try:
        result = trainer.train()
    except TrainingInterrupted:
        trainer.processes.destroy_process_group()
        raise
    trainer.processes.destroy_process_group()
    if not trainer.processes.is_main_process:
        return
    print(
        f"{result.steps} steps in {result.seconds:.0f} s; model of step {result.best_step} saved to {result.output}"
    )
    if result.metrics:
        print_metrics(result.metrics)
    if options["push"] is not None:
        from rerank_fast.model.cross_encoder import CrossEncoder

        print(CrossEncoder(result.output, device="cpu").push_to_hub(options["push"]))


def _recipe_trainer(options: dict[str, Any]) -> Any:
    from rerank_fast.recipes import load_recipe

    # A flag beside the recipe would be ignored: say so.
    defaults = make_parser().parse_args([]).as_dict()
    beside = ("recipe", "set", "push", "config")
    given = [name for name, value in options.items() if name not in beside and value != defaults[name]]
    if given:
        raise ValueError(f"with --recipe, settings go as --set {given[0]}=...; got {', '.join(given)}")
    recipe = load_recipe(options["recipe"], options["set"] or [])

    from rerank_fast.training.from_recipe import build_trainer

    return build_trainer(recipe)


def _trainer(options: dict[str, Any]) -> Any:
    if options["set"]:
        raise ValueError("--set overrides a recipe: it needs --recipe")
    model, train, evaluation, columns = (options[name] for name in ("model", "train", "eval", "columns"))
    names = {field.name for field in fields(TrainingConfig)}
    if isinstance(options["trackers"], str):
        options = {**options, "trackers": options["trackers"].split(",")}
    # A wrong value is said before torch is imported.
    config = TrainingConfig(**{name: value for name, value in options.items() if name in names})

    from rerank_fast.data.lists import ListStream
    from rerank_fast.training.trainer import Trainer

    trainer = Trainer(
        model,
        ListStream(train, columns=columns) if config.streaming else lists_of(train, columns),
        eval=evaluation and lists_of(evaluation, columns),
        config=config,
    )
    trainer.card.sources = [train]  # what lists_of has read here no longer says where it came from
    return trainer

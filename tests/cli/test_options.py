"""Every option of every command arrives at the function behind the command.

What is behind it is replaced by something that notes what it was given, under the option's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from rerank_fast import cli
from rerank_fast.cli import commands
from rerank_fast.recipes import load_recipe
from rerank_fast.training import TrainingConfig

OWN = "own-lists-lambdaloss"
_TYPES = get_type_hints(TrainingConfig)
# The command's own arguments, without which it does not run.
_NEEDED = {
    "train": {"model": "a-model", "train": "a.jsonl"},
    "evaluate": {"model": ["a-model"], "data": "a.jsonl"},
    "score": {"model": "a-model", "input": "a.jsonl", "output": "a.parquet"},
    "mine": {"queries": "a.jsonl", "output": "a.jsonl"},
    "export": {"model": "."},
    "recipes": {},
    "demo": {},
}
_NANO = {"data": None, "nano_beir": ["nq"]}
_DENSE = {"retriever": "an-encoder"}
_RESCORED = {"cross_encoder": "a-reranker"}
# A value other than the default for each option, and what else must be given with it.
_VALUES: dict[str, dict[str, Any]] = {
    "train": {
        "model": "other", "train": "b.jsonl", "eval": "c.jsonl", "columns": {"query": "q"},
        "labels": "scores",
        "recipe": (OWN, {"model": None, "train": None, "set": ["lists=b.jsonl"]}),
        "set": (["lists=b.jsonl", "batch_size=7"], {"model": None, "train": None, "recipe": OWN}),
        "dry_run": True, "push": "me/it", "resume": "auto",
        "trackers": ["tensorboard", "wandb"], "output": "elsewhere",
        "metric_for_best": ("mrr@7", {"eval": "c.jsonl"}), "streaming": (True, {"max_steps": 3}),
        "shuffle_buffer": (7, {"streaming": True, "max_steps": 3}),
        "resume_changed": (True, {"resume": "auto"}),
        "schedule_options": {"num_cycles": 2}, "optimizer_options": {"momentum": 0.5},
        "objective": "listnet", "objective_options": ({"temperature": 2.0},
        {"objective": "listnet"}),
        "lora_alpha": (7.0, {"lora_rank": 2}), "lora_dropout": (0.5, {"lora_rank": 2}),
        "lora_target_modules": (["query"], {"lora_rank": 2}),
    },
    "evaluate": {
        "model": ["other"], "data": "b.jsonl", "columns": {"query": "q"},
        "nano_beir": (["nq"], {"data": None}),
        "nano_beir_id": ("me/nano", _NANO), "rerank_k": (7, _NANO), "metrics": ["R@5"],
        "output": "out.json", "details": "runs", "at_k": 7, "max_length": 77, "dtype": ["int8"],
        "batch_size": 7,
    },
    "score": {
        "model": "other", "input": "b.jsonl", "output": "b.parquet", "columns": {"query": "q"},
        "keep": ["id"], "dtype": "bfloat16", "max_length": 77, "batch_size": 7, "rows_per_part": 7,
        "prompt": "find: ", "overwrite": True,
    },
    "mine": {
        "queries": "b.jsonl", "corpus": "c.jsonl", "output": "b.parquet", "overwrite": True,
        "columns": {"text": "t"}, "retriever": "an-encoder",
        "query_prompt": ("q: ", _DENSE), "corpus_prompt": ("d: ", _DENSE),
        "similarity": ("dot", _DENSE),
        "cache_folder": ("cache", _DENSE), "embedding_dtype": ("float16", _DENSE),
        "use_faiss": (True, _DENSE), "cross_encoder": "a-reranker", "max_length": (77, _RESCORED),
        "dtype": ("bfloat16", _RESCORED), "batch_size": (7, _RESCORED),
        "num_negatives": 7, "range_min": 7,
        "range_max": 77, "max_score": 0.7, "min_score": 0.7, "absolute_margin": 0.7,
        "relative_margin": 0.7, "sampling_strategy": "random", "labels": "scores", "seed": 7,
        "query_batch_size": 7, "show_progress_bar": True,
    },
    "export": {
        "model": "other", "format": "onnx", "dtype": "int8", "output": "elsewhere",
        "data": "b.jsonl",
        "columns": ({"query": "q"}, {"data": "b.jsonl"}), "tolerance": 0.7, "overwrite": True,
    },
    "recipes": {"name": OWN},
    "demo": {"output": "elsewhere", "overwrite": True, "max_steps": 7, "seed": 7},
}  # fmt: skip
# The one value there is.
_NO_OTHER = {("export", "format")}


@functools.cache
def parser_of(command: str) -> Any:
    """To be asked; it is not what the commands are run by."""
    return commands.make_parser()._subcommands_action.choices[command]


def options_of(command: str) -> list[str]:
    """All of a command, without those of jsonargparse and argparse."""
    parser = parser_of(command)
    others = ("help", "config", "print_config")
    names = [action.dest for action in parser._actions if action.dest not in others]
    assert len(names) == len(set(names))
    return names


def value_of(command: str, name: str) -> tuple[Any, dict[str, Any]]:
    """A value other than the default, from the type where any value of that will do."""
    chosen = _VALUES[command].get(name)
    if chosen is not None:
        return chosen if isinstance(chosen, tuple) else (chosen, {})
    assert command == "train", f"say a value for {command} --{name}"
    kind, default = _TYPES[name], getattr(TrainingConfig(), name)
    if get_origin(kind) is Literal:
        return next(one for one in get_args(kind) if one != default), {}
    if name == "show_progress_bar":  # by default where there is a terminal; here there is none
        return True, {}
    if kind is bool:
        return not default, {}
    if int in (kind, *get_args(kind)):
        return 7 if default != 7 else 8, {}
    if float in (kind, *get_args(kind)):
        return default / 2 if default else 0.25, {}
    assert list[str] in (kind, *get_args(kind)), f"say a value for --{name}"
    return ["a", "b"], {}


def arguments(command: str, settings: dict[str, Any]) -> list[str]:
    """The command line of settings; a list is several values where the option takes those."""
    parser = parser_of(command)
    actions = {action.dest: action for action in parser._actions}
    result = [command]
    for name, value in settings.items():
        action = actions[name]
        flags = [] if not action.option_strings else [f"--{name}"]
        if value is None:
            continue
        if action.nargs == 0:
            result += flags
        elif isinstance(value, list) and name in ("model", "dtype"):
            result += [item for one in value for item in (*flags, one)]
        elif isinstance(value, list) and action.nargs in ("+", "*"):
            result += [*flags, *value]
        else:
            result += [
                *flags,
                value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True),
            ]
    return [one.removesuffix("\n...\n").strip("\n") for one in result]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the functions behind the commands are given, by the name of the option."""
    monkeypatch.chdir(tmp_path)
    noted: dict[str, Any] = {}

    def note(**values: Any) -> None:
        noted.update(values)

    for behind in (
        _behind_train,
        _behind_evaluate,
        _behind_score,
        _behind_mine,
        _behind_export,
        _behind_demo,
    ):
        behind(monkeypatch, note)
    return noted


Note = Callable[..., None]


def _model(note: Note) -> Callable[..., Any]:
    def make(path: str, **options: Any) -> Any:
        note(opened=path, **{name: value for name, value in options.items() if name != "device"})
        return SimpleNamespace(
            dtype_name="float32",
            warn_of_truncation=lambda *counts: None,
            push_to_hub=lambda repository: note(push=repository),
            save_pretrained=lambda path, overwrite: note(saved=(str(path), overwrite)),
        )

    return make


def _behind_train(monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    from rerank_fast.data import lists
    from rerank_fast.model import storage
    from rerank_fast.recipes import building
    from rerank_fast.training import dry_run, trainer

    result = SimpleNamespace(steps=1, seconds=1, best_step=1, output="x", metrics={})
    processes = SimpleNamespace(is_main_process=True, destroy_process_group=lambda: None)

    def make(model: Any, train: Any, *, eval: Any = None, config: TrainingConfig) -> Any:
        note(model=model, train=train, eval=eval, **vars(config))
        return SimpleNamespace(card=SimpleNamespace(), processes=processes, train=lambda: result)

    def build(recipe: Any) -> Any:
        note(recipe=recipe.model, lists=recipe.lists)
        return make(recipe.model, recipe.lists, config=recipe.training)

    def read(source: Any, *, columns: Any = None, labels: str = "relevance") -> Any:
        note(columns=columns, labels=labels)
        return source

    monkeypatch.setattr(trainer, "Trainer", make)
    monkeypatch.setattr(building, "build_trainer", build)
    monkeypatch.setattr(lists, "load_lists", read)
    monkeypatch.setattr(lists, "ListStream", read)
    monkeypatch.setattr(lists, "names_of", lambda source: [source])
    monkeypatch.setattr(storage, "create_repository", lambda name, **options: note(made=name))
    monkeypatch.setattr(dry_run, "describe", lambda trainer: note(dry_run=True) or [])


def _behind_evaluate(monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    import rerank_fast.evaluation as evaluation
    from rerank_fast.model import cross_encoder

    def measure(model: Any, output_path: str | None = None) -> dict[str, float]:
        note(details=output_path)
        return {"map": 0.5}

    def lists(data: Any, **options: Any) -> Any:
        note(data=data, **options)
        return measure

    def nano(names: Any, dataset_id: str, **options: Any) -> Any:
        note(nano_beir=names, nano_beir_id=dataset_id, **options)
        return measure

    monkeypatch.setattr(evaluation, "RerankingEvaluator", lists)
    monkeypatch.setattr(evaluation, "NanoBEIREvaluator", nano)
    monkeypatch.setattr(cross_encoder, "CrossEncoder", _model(note))


def _behind_score(monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    from rerank_fast import score_file
    from rerank_fast.model.precision import names

    def score(model: Any, source: str, output: str, **options: Any) -> Any:
        note(input=source, output=output, **options)
        return SimpleNamespace(truncated=0, scored=0, rows=0)

    monkeypatch.setattr(score_file, "score_file", score)
    monkeypatch.setattr(names, "choose_precision", lambda dtype, device: dtype)


def _behind_mine(monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    from rerank_fast.data import mining

    def mine_lists(queries: Any, corpus: Any, **options: Any) -> Any:
        note(queries=queries, corpus=corpus, **options)
        return mining.MiningResult("x")

    def dense(encoder: Any, **options: Any) -> Any:
        note(**options)
        return encoder

    monkeypatch.setattr(mining, "mine_hard_negatives", mine_lists)
    monkeypatch.setattr(mining, "DenseRetriever", dense)
    monkeypatch.setattr(cli.mine, "_sentence_transformer", lambda path: path)


def _behind_export(monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    from rerank_fast.model import export

    def write(model: Any, directory: Any, **options: Any) -> Any:
        note(directory=str(directory), **options)
        file = Path(__file__)
        return export.Exported(file, options["dtype"], 1, 0.0, 1.0, 1.0)

    monkeypatch.setattr(export, "export_onnx", write)


def _behind_demo(monkeypatch: pytest.MonkeyPatch, note: Note) -> None:
    from rerank_fast import demo

    monkeypatch.setattr(demo, "run_demo", lambda **options: note(**options))


def received(command: str, name: str, seen: dict[str, Any]) -> Any:
    """What came of an option, where it is not noted under its name."""
    if (command, name) == ("train", "recipe"):
        return OWN if seen["recipe"] == load_recipe(OWN, ["lists=x"]).model else None
    if (command, name) == ("train", "set"):
        return [f"lists={seen['lists'][0]}", f"batch_size={seen['batch_size']}"]
    if (command, name) == ("evaluate", "model"):
        return [seen["opened"]]
    if (command, name) == ("evaluate", "dtype"):
        return [seen["dtype"]]
    if (command, name) in (("score", "model"), ("export", "model")):
        return seen["opened"]
    if (command, name) == ("evaluate", "output"):
        return next(str(path) for path in Path().iterdir())
    if (command, name) == ("mine", "cross_encoder"):
        return seen["opened"]
    if (command, name) == ("export", "output"):
        assert seen["saved"] == (seen["directory"], False)
        return seen["directory"]
    if (command, name) == ("export", "data"):
        return "b.jsonl" if seen["pairs"] == [("q", "d")] else None
    if (command, name) == ("export", "format"):
        return "onnx"
    return seen[name]


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in _NEEDED for name in options_of(command)]
)
def test_an_option_arrives(
    command: str,
    name: str,
    seen: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    value, others = value_of(command, name)
    default = parser_of(command).get_defaults().get(name)
    assert value != default or (command, name) in _NO_OTHER
    if command == "export":
        from rerank_fast.data import lists

        def read(source: Any, *, columns: Any = None, labels: str = "relevance") -> Any:
            if columns is not None:
                seen["columns"] = columns
            return [{"query": "q", "docs": ["d"], "labels": [1]}]

        monkeypatch.setattr(lists, "load_lists", read)
        Path("other").mkdir()
    line = arguments(command, {**_NEEDED[command], **others, name: value})
    assert cli.main(line) == 0, capsys.readouterr().err
    if command == "recipes":
        assert yaml.safe_load(capsys.readouterr().out)["metric_for_best"] == "ndcg@10"
    else:
        assert received(command, name, seen) == value


def test_every_setting_of_a_run_is_an_option():
    assert {field.name for field in fields(TrainingConfig)} <= {*options_of("train")}


@pytest.mark.parametrize("command", _NEEDED)
def test_hyphens_are_underscores_in_flags_and_in_yaml(command: str, tmp_path: Path):
    parser = commands.make_parser()
    values = {name: value_of(command, name) for name in options_of(command)}
    together = {name: value for name, (value, others) in values.items() if not others}
    alone = [{**others, name: value} for name, (value, others) in values.items() if others]
    for given in (together, *alone):
        settings = {**_NEEDED[command], **given}
        line = arguments(command, settings)
        spelled = [one.replace("_", "-") if one.startswith("--") else one for one in line]
        parsed = parser.parse_args(line)
        assert parser.parse_args(spelled) == parsed
        file = tmp_path / "settings.yaml"
        hyphened = {key.replace("_", "-"): one for key, one in settings.items()}
        file.write_text(yaml.safe_dump(hyphened))
        from_file = parser.parse_args([command, "--config", str(file)])[command].as_dict()
        from_line = parsed[command].as_dict()
        del from_file["config"], from_line["config"]
        assert from_file == from_line


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("train", "set"),
        ("evaluate", "model"),
        ("evaluate", "dtype"),
        ("evaluate", "metrics"),
        ("score", "keep"),
    ],
)
def test_of_several_values_one_may_stand_alone_in_yaml(command: str, name: str, tmp_path: Path):
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**_NEEDED[command], name: "x"}))
    line = [command, "--config", str(tmp_path / "settings.yaml")]
    parsed = commands.make_parser().parse_args(line)
    assert parsed[command][name] == ["x"]


@pytest.mark.parametrize("command", _NEEDED)
def test_the_settings_of_a_command_are_printed_and_can_be_given_back(
    command: str,
    seen: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    line = arguments(command, _NEEDED[command])
    with pytest.raises(SystemExit) as stop:
        cli.main([*line, "--print_config"])
    assert stop.value.code == 0
    assert not seen
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*line, "--print-config"])
    assert capsys.readouterr().out == printed
    # Recipes have no name by default.
    assert set(yaml.safe_load(printed)) == {*options_of(command)} - {"name"}
    (tmp_path / "printed.yaml").write_text(printed)
    assert cli.main(line) == 0
    by_flags = dict(seen)
    seen.clear()
    assert cli.main([command, "--config", str(tmp_path / "printed.yaml")]) == 0
    assert seen == by_flags


def test_of_a_recipe_what_was_given_is_printed(capsys: pytest.CaptureFixture, tmp_path: Path):
    line = ["train", "--recipe", OWN, "--set", "lists=a.jsonl", "seed=7"]
    with pytest.raises(SystemExit):
        cli.main([*line, "--print_config"])
    # Nothing of TrainingConfig's defaults, which are not the recipe's.
    assert yaml.safe_load(capsys.readouterr().out) == {
        "recipe": OWN,
        "set": ["lists=a.jsonl", "seed=7"],
    }


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_steps", str(TrainingConfig().eval_steps)],
        ["--columns", "null"],
        ["--batch_size", "4"],
    ],
    ids=["the default, which is not the recipe's", "nothing", "another value"],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_beside_a_recipe_no_setting_is_dropped_in_silence(
    flags: list[str],
    by_file: bool,
    seen: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    line = ["train", "--recipe", OWN, "--set", "lists=a.jsonl"]
    if by_file:
        (tmp_path / "run.yaml").write_text(f"{flags[0][2:]}: {flags[1]}\n")
        flags = ["--config", str(tmp_path / "run.yaml")]
    assert cli.main([*line, *flags]) == 2
    assert "with --recipe, settings go as --set " in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize("name", ["overwrite", "resume", "resume_changed"])
def test_how_a_run_starts_is_said_beside_a_recipe_too(name: str, seen: dict[str, Any]):
    value, _ = value_of("train", name)
    others = {"resume": "auto"} if name == "resume_changed" else {}
    line = arguments("train", {"recipe": OWN, "set": ["lists=a.jsonl"], **others, name: value})
    assert cli.main(line) == 0
    assert seen[name] == value


@pytest.mark.parametrize(
    ("command", "settings", "refused"),
    [
        ("evaluate", {"rerank_k": 7}, "rerank_k"),
        ("evaluate", {"nano_beir_id": "me/nano"}, "nano_beir_id"),
        ("evaluate", {**_NANO, "columns": {"query": "q"}}, "columns"),
        ("export", {"columns": {"query": "q"}}, "columns"),
        *(("mine", {name: _VALUES["mine"][name][0]}, name) for name in cli.mine._ENCODERS),
        ("train", {"shuffle_buffer": 7}, "shuffle_buffer"),
        ("train", {"lora_alpha": 7.0}, "lora_alpha"),
        ("train", {"lora_dropout": 0.5}, "lora_dropout"),
        ("train", {"lora_target_modules": ["query"]}, "lora_target_modules"),
        ("train", {"scheme": "ndcg2", "mu": 7.0}, "mu"),
        ("train", {"gradient_cache": "off", "skip_below": 0.5}, "skip_below"),
        ("train", {"resume_changed": True}, "resume_changed"),
        ("train", {"metric_for_best": "map"}, "metric_for_best"),
        ("mine", {"max_length": 77}, "max_length"),
        ("mine", {"dtype": "bfloat16"}, "dtype"),
        ("mine", {"batch_size": 7}, "batch_size"),
    ],
)
def test_an_option_that_would_decide_nothing_is_refused(
    command: str,
    settings: dict[str, Any],
    refused: str,
    seen: dict[str, Any],
    capsys: pytest.CaptureFixture,
):
    assert cli.main(arguments(command, {**_NEEDED[command], **settings})) == 2
    assert f"error: --{refused} " in (errors := capsys.readouterr().err)
    assert "would not be applied" in errors


def test_several_objectives_are_a_list_on_the_line_and_in_yaml(tmp_path: Path):
    several = [{"name": "listnet", "temperature": 0.5}, {"name": "lambda_loss", "weight": 0.5}]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "train": "t", "objective": several}))
    parser = commands.make_parser()
    for line in (
        ["--config", str(file)],
        ["--model", "m", "--train", "t", "--objective", str(several)],
    ):
        assert parser.parse_args(["train", *line]).train.objective == several

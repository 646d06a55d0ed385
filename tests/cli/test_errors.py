"""No user's error shows a stack trace, from whatever command, and each names what was typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rerank_fast import cli
from rerank_fast.cli import commands
from rerank_fast.cli.errors import in_flags
from rerank_fast.training.events import TrainingInterrupted
from tests.cli.test_parser import COMMANDS
from tests.model_factory import make_tiny_bert
from tests.stand_ins import make_nano_beir

_ROWS = [
    {
        "query": f"what is the panda {i}",
        "docs": ["fish rain sea", "panda rain", "bear"],
        "labels": [0, 1, 0],
    }
    for i in range(8)
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("errors")
    make_tiny_bert(directory / "bert")
    make_nano_beir(directory / "nano", sets=("NQ",))
    (directory / "a_file").write_text("not a directory")
    for name, rows in (
        ("lists", _ROWS),
        ("pairs", [{"query": "panda", "document": "bear"}]),
        ("queries", [{"query": "panda rain", "positives": ["panda rain sea"]}]),
        (
            "corpus",
            [{"id": i, "text": one} for i, one in enumerate(["panda sun", "bear rain", "sea"])],
        ),
    ):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def command(work: Path, line: str) -> list[str]:
    """A line with @name for a path in the working directory."""
    return re.sub(r"(?<=[ =])@", f"{work}/", line).split()


_TRAIN = "train --model @bert --train @lists.jsonl --show_progress_bar false --precision fp32"
_OWN = "train --recipe own-lists-lambdaloss --set lists=lists.jsonl"
_SCORE = "score --model @bert --input @pairs.jsonl --output @scores.parquet"
_SOURCES = "--queries @queries.jsonl --corpus @corpus.jsonl"
_MINE = f"mine {_SOURCES} --output @mined.jsonl --show_progress_bar false"
_EVALUATE = "evaluate --model @bert --data @lists.jsonl"
_NANO = "evaluate --model @bert --nano_beir nq --nano_beir_id @nano"


def error_of(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a failed command ends with."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    begins = f"rerank-fast {arguments[0]}: error: "
    (line,) = [line for line in errors.splitlines() if line.startswith(begins)]
    assert errors.splitlines()[-1] == line
    return line


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (f"{_TRAIN} --learning_rate -1", "--learning_rate must be"),
        (f"{_TRAIN} --seed -1", "--seed must be"),
        (f"{_TRAIN} --k -1", "--k must be"),
        (f"{_TRAIN} --eps 0", "--eps must be"),
        (f"{_TRAIN} --objective lambdaloss", "unknown objective 'lambdaloss'; there are "
                                             "lambda_loss,"),
        (f"{_TRAIN} --objective listnet --k 3", "--k 3 would not be applied: objective is listnet"),
        (f"{_TRAIN} --objective_options.k 3", "--objective_options must be empty here"),
        (f"{_TRAIN} --in_batch_negatives 2 --objective mse", "--in_batch_negatives must be 0 with"),
        (f"{_OWN} objective=listnet sigma=2", "--set sigma 2 would not be applied: objective is"),
        (f"{_TRAIN} --max_length 9999", "--max_length is 9999"),
        (f"{_TRAIN} --streaming true", "--max_steps must be set"),
        (f"{_TRAIN} --lora_rank 2 --freeze_layers 1", "--freeze_layers and --freeze must be"),
        (f"{_TRAIN} --early_stopping_patience 2", "--early_stopping_patience is 2, but nothing is"),
        (f"{_TRAIN} --eval @lists.jsonl --metric_for_best x_map", "--metric_for_best is x_map"),
        (f"{_TRAIN} --output @bert", "--output @bert already holds a model; pass --overwrite to"),
        (f"{_TRAIN} --resume @bert", "--resume: @bert is no checkpoint"),
        (f"{_OWN} batch_size=0", "--set batch_size must be"),
        (f"{_OWN} held_out=-1", "--set held_out must be"),
        (f"{_OWN} --resume @bert", "--resume: @bert is no checkpoint"),
        (f"{_SCORE} --rows_per_part 0", "--rows_per_part must be at least 1"),
        (f"{_SCORE} --batch_size 0", "--batch_size must be at least 1"),
        (f"{_SCORE} --max_length 3", "--max_length must"),
        (f"{_SCORE} --dtype fp7", "--dtype must be"),
        (f"{_SCORE} --dtype float8_e4m3fn", "--dtype must be"),
        (f"{_SCORE} --keep score", "--keep can't hold score"),
        (f"{_EVALUATE} --batch_size 0", "--batch_size must be at least 1"),
        (f"{_EVALUATE} --at_k 0", "--at_k must be"),
        (f"{_EVALUATE} --dtype fp7", "--dtype must be"),
        (f"{_NANO} --rerank_k 0", "--rerank_k must be at least 1"),
        (f"{_MINE} --num_negatives 0", "--num_negatives must be at least 1"),
        (f"{_MINE} --range_min -1", "--range_min must be at least 0"),
        (f"{_MINE} --max_score .nan", "--max_score must be finite"),
        (f"{_MINE} --seed -1", "--seed must be at least 0"),
        (f"{_MINE} --query_batch_size 0", "--query_batch_size must be at least 1"),
        (f"{_MINE} --labels teacher", "needs a --cross_encoder"),
        ("demo --output @out --max_steps 0", "--max_steps must be"),
        ("demo --output @out --seed -1", "--seed must be"),
    ],
)  # fmt: skip
def test_an_error_names_the_flag_and_not_pythons_argument(
    line: str,
    flag: str,
    work: Path,
    capsys: pytest.CaptureFixture,
):
    expected = flag.replace("@", f"{work}/")
    assert f"error: {expected}" in error_of(command(work, line), capsys) or " a --" in flag


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_steps must be set, got max_steps=3", "--max_steps must be set, got --max_steps=3"),
        ("seed must be 1, got the seed 2", "--seed must be 1, got the seed 2"),
        ("seeds are many", "seeds are many"),
        ("/data/max_steps/a.jsonl, line 3", "/data/max_steps/a.jsonl, line 3"),
        ("no column 'max_steps' here", "no column 'max_steps' here"),
        ("pass overwrite=True (--overwrite) to go", "pass --overwrite to go"),
        ("it needs eval (--eval) or more (than that)", "it needs --eval or more (than that)"),
        ("--max_steps stays", "--max_steps stays"),
    ],
)
def test_words_that_are_no_arguments_stay(message: str, expected: str):
    flags = {name: f"--{name}" for name in ("max_steps", "seed", "overwrite", "eval")}
    assert in_flags(message, flags) == expected


@pytest.mark.parametrize(
    "line",
    [
        _TRAIN.replace("@bert", "@no/such/model") + " --output @new",
        _TRAIN.replace("@lists.jsonl", "@no.jsonl") + " --output @new",
        f"{_TRAIN} --eval @no.jsonl --output @new",
        f'{_TRAIN} --columns {{"query":"nothing"}} --output @new',
        f"{_OWN} model=@bert output=@new",
        _EVALUATE.replace("@bert", "@no/such/model") + " --output @new.json --details @new",
        _EVALUATE.replace("@lists.jsonl", "@no.jsonl") + " --output @new.json --details @new",
        _SCORE.replace("@bert", "@no/such/model").replace("@scores", "@new"),
        _SCORE.replace("@pairs.jsonl", "@no.jsonl").replace("@scores", "@new"),
        _MINE.replace("@corpus.jsonl", "@no.jsonl").replace("@mined", "@new"),
        f"{_MINE.replace('@mined', '@new')} --cross_encoder @no/such/model",
        f"{_MINE.replace('@mined', '@new')} --retriever @no/such/model --cache_folder @new",
        "export --model @no/such/model --output @new",
        "export --model @bert --data @no.jsonl --output @new",
        "export --model @bert --tolerance 0 --output @new",
    ],
)
def test_a_wrong_path_leaves_nothing_behind(line: str, work: Path, capsys: pytest.CaptureFixture):
    if line.startswith("export"):
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    if line.startswith("mine"):
        pytest.importorskip("bm25s")
    before = sorted(work.rglob("*"))
    error_of(command(work, line), capsys)
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{_TRAIN} --output @a_file/model", "output"),
        (f"{_TRAIN} --output @a_file", "output"),
        (f"{_TRAIN} --output /proc/model", "output"),
        (f"{_OWN} output=@a_file", "output"),
        (f"{_EVALUATE} --output @no/metrics.json", "output"),
        (f"{_EVALUATE} --output @a_file/metrics.json", "output"),
        (f"{_EVALUATE} --output @bert", "output"),
        (f"{_EVALUATE} --output /proc/metrics.json", "output"),
        (f"{_EVALUATE} --output @lists.jsonl", "output"),
        (f"{_EVALUATE} --details @a_file", "details"),
        (f"{_EVALUATE} --details @a_file/runs", "details"),
        (f"{_EVALUATE} --details /proc/runs", "details"),
        (_SCORE.replace("@scores", "@no/scores"), "output"),
        (_SCORE.replace("@scores", "/proc/scores"), ""),
        (_MINE.replace("@mined", "@no/mined"), "output"),
        (_MINE.replace("@mined", "/proc/mined"), ""),
        ("export --model @bert --output @a_file", "output"),
        ("export --model @bert --output /proc/model", "output"),
        ("demo --output @a_file", "output"),
        ("demo --output /proc/demo", "output"),
    ],
)
def test_an_output_that_cant_be_written_is_known_before_the_work(
    line: str,
    name: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    from rerank_fast import demo
    from rerank_fast.model.cross_encoder import CrossEncoder
    from rerank_fast.training.trainer import Trainer

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(CrossEncoder, "score_tokens", fail)
    monkeypatch.setattr(Trainer, "train", fail)
    monkeypatch.setattr(demo, "build_docstring_lists", fail)
    monkeypatch.setattr(demo, "encoder_directory", lambda: "")
    if line.startswith("mine"):
        pytest.importorskip("bm25s")
    content = (work / "lists.jsonl").read_text()
    error = error_of(command(work, line), capsys)
    assert not name or f"error: --{name} " in error or f"error: --set {name} " in error
    assert (work / "lists.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (["config.json", "model.safetensors"], "already holds a model"),
        (["checkpoint-3/trainer_state.json"], "already holds the checkpoints of a run"),
        (
            ["README.md", "checkpoint-3/trainer_state.json"],
            "already holds the checkpoints of a run",
        ),
        (["README.md"], "already holds a README.md"),
    ],
)
def test_what_an_output_holds_is_named(
    held: list[str],
    said: str,
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    error = error_of([*command(work, _TRAIN), "--output", str(tmp_path)], capsys)
    assert f"--output {tmp_path} {said}; pass --overwrite to replace " in error
    assert "checkpoint" not in said or "or --resume auto to go on from its checkpoint" in error


@pytest.mark.parametrize(
    ("line", "package", "said"),
    [
        (_MINE, "bm25s", "pip install 'rerank-fast[mine]'"),
        (
            f"{_MINE} --retriever @bert",
            "sentence_transformers",
            "pip install sentence-transformers",
        ),
        (f"{_MINE} --retriever @bert --use_faiss", "faiss", "faiss"),
        (f"{_TRAIN} --output @new --lora_rank 2", "peft", "pip install 'rerank-fast[lora]'"),
        (f"{_TRAIN} --output @new --trackers comet_ml", "comet_ml", "comet_ml"),
        (_TRAIN, "transformers", "transformers"),
    ],
)
def test_a_missing_package_is_named(
    line: str,
    package: str,
    said: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    if package == "transformers":  # any package that nobody looks for

        def missing(options: object) -> None:
            import no_such_package_of_ours  # noqa: F401

        monkeypatch.setattr(cli.train, "run", missing)
        said = "no_such_package_of_ours"
    monkeypatch.setitem(sys.modules, package, None)
    if package == "faiss":
        monkeypatch.setattr(cli.mine, "_sentence_transformer", lambda path: len)
    assert said in error_of(command(work, line), capsys)


def test_a_push_makes_no_repository_for_a_wrong_path(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    from rerank_fast.model import storage

    made: list[str] = []
    monkeypatch.setattr(storage, "create_repository", lambda name, **options: made.append(name))
    error_of(command(work, _TRAIN.replace("@lists", "@no") + " --push me/it"), capsys)
    assert not made


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_every_command_with_130(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def interrupt(options: object) -> None:
        raise KeyboardInterrupt

    needed = {
        "train": "--model m --train t", "evaluate": "--model m",
        "score": "--model m --input i --output o",
        "mine": "--queries q --output o", "export": "--model m",
        "convert": "--model m --output o",
    }  # fmt: skip
    monkeypatch.setattr(commands.FILES[name], "run", interrupt)
    assert cli.main([name, *needed.get(name, "").split()]) == 130
    assert not capsys.readouterr().err


@pytest.mark.parametrize("line", ["recipes", f"{_TRAIN} --print_config", _EVALUATE])
def test_a_reader_that_is_gone_is_no_error(line: str, work: Path):
    """As in `rerank-fast recipes | head -1`: nothing is said, and the code is a closed pipe's."""
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-m", "rerank_fast", *command(work, line)]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert not [one for one in done.stderr.splitlines() if not one.startswith("INFO: ")]


def test_ctrl_c_while_it_begins_shows_no_traceback():
    program = (
        "import builtins, sys; imported = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name.startswith('jsonargparse'): raise KeyboardInterrupt\n"
        "    return imported(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "from rerank_fast.cli import main\n"
        "sys.exit(main(['recipes']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--debug", "recipes", "nope"],
        ["recipes", "nope", "--debug"],
        ["recipes", "--debug", "nope"],
    ],
)
def test_debug_shows_the_traceback(arguments: list[str], capsys: pytest.CaptureFixture):
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("rerank-fast recipes: error: unknown recipe 'nope'")
    assert cli.main([one for one in arguments if one != "--debug"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_fault_of_the_package_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def fault(options: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(cli.recipes, "run", fault)
    with pytest.raises(KeyError):
        cli.main(["recipes"])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "CUDA error: out of memory\nCUDA kernel errors might be",
            "memory does not suffice: expected a smaller",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "memory does not suffice",
        ),
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            "older than this torch",
        ),
        (
            "CUDA error: no kernel image is available for execution on the device",
            "no kernels for this GPU",
        ),
        (
            "CUDA error: unspecified launch failure\nCUDA kernel errors might be",
            "the GPU was lost: a run",
        ),
    ],
)
def test_what_a_gpu_lacks_is_one_line(
    message: str,
    said: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    import torch

    from rerank_fast.model.cross_encoder import CrossEncoder

    def lost(*arguments: object, **options: object) -> None:
        kind = getattr(torch, "AcceleratorError", RuntimeError)
        error = kind.__new__(kind)  # made by torch alone
        error.args = (message,)
        raise error

    monkeypatch.setattr(CrossEncoder, "_scores", lost)
    line = error_of(command(work, _EVALUATE), capsys)
    assert said in line
    assert message.partition("\n")[0].partition(" Please")[0].rstrip(".") in line


def test_a_bug_keeps_its_trace(work: Path, monkeypatch: pytest.MonkeyPatch):
    from rerank_fast.model.cross_encoder import CrossEncoder

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(CrossEncoder, "_scores", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli.main(command(work, _EVALUATE))


def test_a_gpu_lost_in_a_run_leaves_its_checkpoint(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    from rerank_fast.training.backward import Backward

    call, steps = Backward.__call__, []

    def lost(backward: Backward, *arguments: object) -> object:
        steps.append(len(steps))
        if len(steps) == 3:
            raise RuntimeError(
                "CUDA error: unspecified launch failure\nCUDA kernel errors might be"
            )
        return call(backward, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Backward, "__call__", lost)
    run = f"{_TRAIN} --output {tmp_path / 'run'} --batch_size 2 --save_steps 1 --max_steps 4"
    assert "goes on from its last checkpoint with --resume auto" in error_of(
        command(work, run), capsys
    )
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert cli.main([*command(work, run), "--resume", "auto"]) == 0


def test_a_demo_that_was_stopped_says_that_it_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(**options: object) -> None:
        raise TrainingInterrupted(tmp_path)

    monkeypatch.setattr("rerank_fast.demo.run_demo", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--output", str(tmp_path / "demo")])
    assert ended.value.code == 0
    assert "the same command begins anew" in capsys.readouterr().out

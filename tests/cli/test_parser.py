"""What the command answers to what it can't read, and what it says of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rerank_fast import __version__, cli
from rerank_fast.ops import cpu

COMMANDS = ["train", "evaluate", "score", "mine", "convert", "export", "recipes", "demo"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The two lines of a wrong usage."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 2, captured.err
    assert lines[0].startswith("rerank-fast")
    assert "--help" in lines[1]
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["train", "--lerning_rate", "3"],
            "train: error: unknown flag --lerning_rate; did you mean --learning_rate?",
        ),
        (
            ["train", "--lerning-rate=3"],
            "train: error: unknown flag --lerning-rate; did you mean --learning_rate?",
        ),
        (["mine", "--num_negative", "3", "--output", "x"], "did you mean --num_negatives?"),
        (["score", "--row_per_part", "3"], "did you mean --rows_per_part?"),
        (["evaluate", "--modle", "m"], "did you mean --model?"),
        (["demo", "--step", "3"], "did you mean --max_steps?"),
        (["train", "--learning", "3"], "did you mean --learning_rate?"),  # no prefix is a flag
        (["train", "--zzzz"], "unknown flag --zzzz"),
        (
            ["trian", "--model", "m"],
            "rerank-fast: error: unknown command trian; did you mean train?",
        ),
        (
            ["fly"],
            "unknown command fly; there are train, evaluate, score, mine, convert, export, "
            "recipes, demo",
        ),
        ([], "expected a command: train, evaluate, score, mine, convert, export, recipes, demo"),
        (["train", "a.jsonl"], "a.jsonl"),
        (["train", "--max_steps", "many"], "--max_steps: "),
        (["train", "--precision", "fp8"], "--precision: "),
        (["train", "--max_steps"], "--max_steps: expected"),
        (["score", "--model", "m"], "rerank-fast score: error: --input, --output must be given"),
        (["train"], "rerank-fast train: error: train needs --model and --train, or --recipe"),
        (["--completion", "fish"], "error: --completion: expected one of 'bash', 'zsh', got fish"),
        (
            ["convert", "--model", "m", "--output", "o", "--head", "x"],
            "--head: expected one of ['modular', 'classification', null], got x",
        ),
        (["evaluate", "--model", "m", "--columns", "[1]"], "--columns: "),
    ],
)
def test_a_wrong_usage_is_answered_in_two_lines(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture,
):
    assert expected in answer(arguments, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate: 3", "unknown key lerning_rate; did you mean learning_rate?"),
        ("lerning-rate: 3", "did you mean learning_rate?"),
        ("max_steps: many", "--max_steps: "),
        ("[1, 2]", "--config: expected settings as in {seed: 1}, got '[1, 2]'"),
        ("", "--config: expected settings as in {seed: 1}, got ''"),
        ("a: [", "--config: not YAML: "),
    ],
)
def test_so_is_a_wrong_yaml_file(text: str, expected: str, tmp_path, capsys: pytest.CaptureFixture):
    (tmp_path / "run.yaml").write_text(text)
    assert expected in answer(["train", "--config", str(tmp_path / "run.yaml")], capsys)


def test_and_a_file_that_is_not_there(tmp_path, capsys: pytest.CaptureFixture):
    assert "missing.yaml" in answer(["train", "--config", str(tmp_path / "missing.yaml")], capsys)


def test_the_version_says_which_kernels_run(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    first, kernels, gpu = capsys.readouterr().out.splitlines()
    assert first.startswith(f"rerank-fast {__version__} (Python 3.")
    assert "torch 2." in first
    expected = cpu.instruction_set() if cpu.available() else "none, "
    assert kernels.startswith(f"CPU kernels: {expected}")
    assert gpu.startswith("GPU kernels: Triton ")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_each_flag_in_one_spelling(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag not in printed for flag in ("--max-length", "--max-steps", "--print-config"))
    assert ("--print_config" in printed) == bool(command)
    assert ("--debug" in printed) == (not command)


def test_help_imports_no_torch():
    code = (
        "import sys, rerank_fast.cli as cli\n"
        "lines = ('--help', 'train --help', 'train --lerning_rate 3', 'mine --print_config')\n"
        "for line in lines:\n"
        "    try: cli.main(line.split())\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'triton', 'pyarrow'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What --help shows, and that nothing moves on a screen that is none."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rerank_fast import cli
from rerank_fast.cli.commands import make_parser
from rerank_fast.cli.completion import SHELLS
from rerank_fast.cli.help import arrange
from tests.cli.test_parser import COMMANDS
from tests.model_factory import make_tiny_bert
from tests.training.conftest import make_lists


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_whole_is_one_screen(capsys: pytest.CaptureFixture):
    lines = shown(["--help"], capsys).splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) < 80
    for name in COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in lines)
    for flag in ("--help", "--version", "--debug", "--completion SHELL"):
        assert any(line.startswith(f"  {flag} ") for line in lines)


def examples(text: str) -> list[list[str]]:
    """The lines of a help's examples, split; a backslash joins two."""
    said = text.partition("examples:\n")[2].replace("\\\n", " ")
    lines = (shlex.split(line) for line in said.splitlines())
    return [line[line.index("rerank-fast") + 1 :] for line in lines if line[:1] == ["rerank-fast"]]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_its_examples_can_be_typed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("{model: bert, train: train.jsonl}")
    found = examples(shown([*command.split(), "--help"], capsys))
    found = [line for line in found if "--help" not in line]
    assert found
    commands = [make_parser().parse_args(line).command for line in found]
    assert commands[0] == (command or "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_its_options_in_groups(command: str, capsys: pytest.CaptureFixture):
    text = shown([command, "--help"], capsys)
    assert text.startswith(f"usage: rerank-fast {command}")
    assert max(map(len, text.splitlines())) <= 80
    titles = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    assert titles[0] == "options"
    assert titles[-1] == "examples"
    if command == "train":
        assert titles[1:-1] == [
            "run", "data", "model", "batch and memory", "loss", "optimizer and schedule",
            "evaluation", "output",
        ]  # fmt: skip
    parser = make_parser()._subcommands_action.choices[command]
    for action in parser._actions:
        assert action.help, action.dest
        if action.option_strings and action.dest not in ("help", "config", "print_config"):
            assert len(re.findall(rf"^  --{action.dest}\b", text, re.MULTILINE)) == 1
    # What is typed is null and true, not Python's.
    assert not re.search(r"\b(None|True|False)\b", text)
    assert "_typehint" not in text


def test_defaults_are_shown(capsys: pytest.CaptureFixture):
    text = " ".join(shown(["train", "--help"], capsys).split())
    assert "--batch_size N lists per optimizer step" in text
    for default in ("16", "2e-05", "ndcg2pp", "false", "lambda_loss", "reranker"):
        assert f"default: {default})" in text
    assert "default: null" not in text


def test_an_option_without_a_group_is_noticed():
    parser = make_parser()._subcommands_action.choices["demo"]
    with pytest.raises(ValueError, match=r"got \['seed'\] in none or several"):
        arrange(parser, {"run": ["max_steps"], "output": ["output", "overwrite"]})
    with pytest.raises(ValueError, match="'sed'"):
        arrange(parser, {"run": ["max_steps", "seed", "sed"], "output": ["output", "overwrite"]})


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(shell: str, capsys: pytest.CaptureFixture):
    pytest.importorskip("shtab")
    script = shown(["--completion", shell], capsys)
    assert all(command in script for command in COMMANDS)
    assert "--learning_rate" in script
    assert "--learning-rate" not in script


def complete(script: Path, line: str) -> set[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    program = f"""
    source {shlex.quote(str(script))}
    COMP_WORDS=({" ".join(map(shlex.quote, words))})
    COMP_CWORD={len(words) - 1} COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_TYPE=9
    function=$(complete -p rerank-fast | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $function rerank-fast {shlex.quote(words[-1])} {shlex.quote(words[-2])}
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program], cwd=script.parent, capture_output=True, text=True, check=True
    )
    return {one.strip() for one in done.stdout.split()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(shown(["--completion", "bash"], capsys))
    (tmp_path / "train.jsonl").touch()
    assert complete(script, "rerank-fast tr") == {"train"}
    assert complete(script, "rerank-fast train --learning") == {"--learning_rate"}
    assert complete(script, "rerank-fast train --train tr") == {"train.jsonl"}
    assert complete(script, "rerank-fast train --scheme ndcg2") == {"ndcg2", "ndcg2pp"}
    assert complete(script, "rerank-fast demo --") >= {"--max_steps", "--seed", "--output"}


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--completion", "bash"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "rerank-fast: error: --completion needs shtab: pip install shtab\n"
    assert not captured.out


def test_no_bar_is_drawn_where_there_is_no_terminal(tmp_path: Path):
    """Of this package or of a library: nothing but what is said."""
    make_tiny_bert(tmp_path / "bert")
    make_lists(16).to_json(tmp_path / "train.jsonl")
    pairs = [{"query": "rain", "document": "wet"}] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    program = "import sys; from rerank_fast import cli; " + "".join(
        f"assert cli.main({line.split()!r}) == 0; "
        for line in (
            "train --model bert --train train.jsonl --eval train.jsonl --output out "
            "--precision fp32",
            "evaluate --model out --data train.jsonl",
            "score --model out --input pairs.jsonl --output scores.parquet",
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    assert "it/s" not in done.stderr
    assert "steps in" in done.stdout

"""Each command that opens a model says in a line what is wrong with one, and shows no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rerank_fast import cli
from tests.model.storage.damage import edit, edit_weights
from tests.model.test_padding import make_decoder
from tests.model_factory import make_tiny_bert

_ROWS = [{"query": "the panda", "docs": ["fish rain sea", "panda rain", ""], "labels": [0, 1, 0]}]
COMMANDS = {
    "score": "--model @model --input @pairs.jsonl --output @scores.parquet",
    "evaluate": "--model @model --data @lists.jsonl",
    "train": "--model @model --train @lists.jsonl --output @trained --max_steps 1 "
    "--show_progress_bar false",
    "export": "--model @model",
    "mine": "--queries @queries.jsonl --corpus @corpus.jsonl --output @mined.jsonl "
    "--cross_encoder @model --labels teacher --show_progress_bar false",
    "convert": "--model @model --output @converted",
}


def command(name: str, directory: Path) -> list[str]:
    files: dict[str, list[dict[str, Any]]] = {
        "lists": _ROWS,
        "pairs": [{"query": "panda", "document": "bear"}, {"query": "", "document": ""}],
        "queries": [{"query": "panda rain", "positives": ["panda rain sea"]}],
        "corpus": [{"id": 1, "text": "panda sun"}, {"id": 2, "text": "bear rain"}],
    }
    for file, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{file}.jsonl").write_text(lines)
    return [name, *COMMANDS[name].replace("@", f"{directory}/").split()]


def lacking_a_layer(directory: Path) -> None:
    make_tiny_bert(directory)
    edit_weights(
        directory, lambda all: [all.pop(one) for one in list(all) if "layer.1" in one] and None
    )


def of_two_labels(directory: Path) -> None:
    make_tiny_bert(directory)
    edit(directory, "config.json", architectures=None)
    head = {"classifier.weight": torch.zeros(2, 32), "classifier.bias": torch.zeros(2)}
    edit_weights(directory, lambda all: all.update(head))


def of_an_unknown_activation(directory: Path) -> None:
    make_tiny_bert(directory)
    edit(directory, "config.json", sentence_transformers={"activation_fn": "torch.nn.Nope"})


def without_a_token_to_end_a_text(directory: Path) -> None:
    make_decoder("Llama", directory)
    names = ("eos_token", "sep_token", "bos_token", "cls_token")
    edit(directory, "tokenizer_config.json", **dict.fromkeys(names))


def without_a_padding_token(directory: Path) -> None:
    make_decoder("GPT2", directory)


BROKEN: dict[Callable[[Path], None], dict[str, str]] = {
    lacking_a_layer: dict.fromkeys(
        ("score", "evaluate", "train", "export", "mine"), "16 of the encoder's 37 weights are not"
    ),
    of_two_labels: dict.fromkeys(
        ("score", "evaluate", "train", "export", "mine"), "has 2 labels; expected"
    ),
    of_an_unknown_activation: dict.fromkeys(
        ("score", "evaluate", "train", "export", "mine"), "names the activation torch.nn.Nope"
    ),
    without_a_token_to_end_a_text: {
        "score": "pairs.jsonl, part 0 of 4096 rows: pair 1: both texts are empty"
    },
    without_a_padding_token: {"export": "has no padding token, by which a batch of an ONNX"},
}
CASES = [(make, name) for make, commands in BROKEN.items() for name in commands]


@pytest.mark.parametrize(
    ("make", "name"), CASES, ids=[f"{make.__name__}-{name}" for make, name in CASES]
)
def test_a_broken_model_is_said_in_a_line(
    make: Callable[[Path], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    if name == "export":
        pytest.importorskip("onnxscript")
    make(tmp_path / "model")
    capsys.readouterr()
    assert cli.main(command(name, tmp_path)) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert not said.out
    last = said.err.splitlines()[-1]
    assert last.startswith(f"rerank-fast {name}: error: ")
    assert BROKEN[make][name] in last
    assert "\x1b" not in last
    assert len(last) < 500 + len(str(tmp_path))

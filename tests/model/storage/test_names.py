"""Weights under names that wrappers left, and files that lack some of them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rerank_fast import CrossEncoder
from tests.model.storage.damage import PAIRS, edit, edit_weights, refused, shard


def rename(directory: Path, pattern: str, replacement: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    renamed = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        ("^", "_orig_mod."),
        ("^", "module."),
        ("^", "module._orig_mod."),
        ("^", "_orig_mod.module."),
        ("^", "model."),
        ("^", "0.auto_model."),
        ("^", "somebodys_own_trainer.net."),
        ("^", "_fsdp_wrapped_module."),
        (r"layer\.(\d)\.", r"layer.\1._orig_mod."),
        (r"layer\.(\d)\.", r"layer.\1._checkpoint_wrapped_module._fsdp_wrapped_module."),
        (r"^(bert\.encoder\.layer\.0\.)", r"\1_orig_mod."),
        (r"^(bert\.)", r"module.\1_orig_mod."),
        (r"layer\.(\d)\.", r"layer.\1.module."),
        (r"^classifier\.", "classifier._orig_mod."),
        (r"^classifier\.", "module.classifier."),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_prefixes_of_wrappers(
    directory: Path, pattern: str, replacement: str, sharded: bool, caplog: pytest.LogCaptureFixture
):
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    rename(directory, pattern, replacement)
    if sharded:
        shard(directory, {})
    model = CrossEncoder(directory, device="cpu")
    np.testing.assert_array_equal(model.predict(PAIRS), expected)
    assert not caplog.records
    model.save_pretrained(directory / "again")  # under the model's own names
    assert "bert.encoder.layer.0.output.dense.weight" in load_file(
        directory / "again" / "model.safetensors"
    )


def test_a_wrapped_bare_encoder_lacks_its_head_alone(
    directory: Path, caplog: pytest.LogCaptureFixture
):
    edit_weights(
        directory,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" in name],
    )
    rename(directory, "^bert", "module")
    CrossEncoder(directory, device="cpu")
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "classifier.bias, classifier.weight start from random values, so train before you rank."
    ]


@pytest.mark.parametrize(
    ("missing", "count"),
    [
        (r"^bert\.encoder\.layer\.1\.", 16),
        (r"^bert\.encoder\.layer\.1\.output\.dense\.weight", 1),
        (r"^bert\.embeddings\.word", 1),
        (r"^bert\.", 37),  # beside the pooler's two, which are of the head
        ("", 37),
    ],
)
@pytest.mark.parametrize("others", [False, True], ids=["alone", "unknown-names"])
def test_missing_weights_of_the_encoder_are_counted(
    directory: Path, missing: str, count: int, others: bool
):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if re.search(missing, name)]:
            value = tensors.pop(name)
            if others:
                tensors[f"{name}_old"] = value
        tensors.setdefault("kept", torch.zeros(1))

    edit_weights(directory, change)
    refused(directory, rf"{count} of the encoder's 37 weights are not in its files, as bert\.")


def test_a_missing_head_is_said_in_a_short_line(directory: Path, caplog: pytest.LogCaptureFixture):
    edit_weights(
        directory,
        lambda tensors: [
            tensors.pop(name)
            for name in list(tensors)
            if "encoder" not in name and "embeddings" not in name
        ],
    )
    CrossEncoder(directory, device="cpu")
    (record,) = caplog.records
    assert "has no trained score head" in record.message
    assert len(record.message) < 200 + len(str(directory))


@pytest.mark.parametrize("architectures", [None, [], ["BertModel"], ["BertForMaskedLM"]], ids=str)
@pytest.mark.parametrize("labels", [2, 3])
def test_more_labels_than_one_are_said_whatever_the_architecture(
    directory: Path, architectures: list[str] | None, labels: int
):
    content = json.loads((directory / "config.json").read_text())
    for name in ("id2label", "label2id", "architectures"):
        content.pop(name, None)
    (directory / "config.json").write_text(json.dumps(content))
    if architectures is not None:
        edit(directory, "config.json", architectures=architectures)
    edit_weights(
        directory,
        lambda tensors: tensors.update(
            {"classifier.weight": torch.zeros(labels, 32), "classifier.bias": torch.zeros(labels)}
        ),
    )
    refused(directory, f"has {labels} labels; expected a sequence-classification model with 1")


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        (r"^(?:bert|classifier)\.", "41 weights of the model under 'student.' and as many under"),
        (r"^bert\.", r"bert\.\S+ twice: as student\.bert\.\S+ and as student\.module\.bert\."),
    ],
)
def test_two_models_in_one_file_are_refused(directory: Path, copy: str, message: str):
    other = "teacher." if "classifier" in copy else "student.module."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            tensors[f"student.{name}"] = value
            if re.search(copy, name):
                tensors[f"{other}{name}"] = value.clone()

    edit_weights(directory, change)
    refused(directory, message)


def test_prefixes_are_no_part_of_the_log(directory: Path, caplog: pytest.LogCaptureFixture):
    rename(directory, "^", "_orig_mod.")
    with caplog.at_level(logging.INFO):
        CrossEncoder(directory, device="cpu")
    assert "_orig_mod" not in caplog.text

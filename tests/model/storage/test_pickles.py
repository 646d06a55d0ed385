"""Pickled weights: closed, and converted where the user asks for it, as tensors and nothing
else.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rerank_fast import CrossEncoder
from rerank_fast.cli import main
from tests.model.modular_factory import ettin, make_peer
from tests.model.storage.damage import PAIRS, refused
from tests.model.storage.test_weights import Payload


def to_pickles(directory: Path, parts: int = 1) -> None:
    """Every safetensors file of a directory as older releases wrote it."""
    for file in directory.rglob("model.safetensors"):
        tensors = load_file(file)
        file.unlink()
        if parts == 1:
            torch.save(tensors, file.with_name("pytorch_model.bin"))
            continue
        names, index = sorted(tensors), {}
        for part in range(parts):
            name = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
            torch.save({key: tensors[key] for key in names[part::parts]}, file.with_name(name))
            index |= dict.fromkeys(names[part::parts], name)
        content = {"metadata": {"total_size": 1}, "weight_map": index}
        (file.parent / "pytorch_model.bin.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("parts", [1, 3])
def test_they_are_closed_until_they_are_converted(
    directory: Path, tmp_path: Path, parts: int, capsys: Any
):
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    to_pickles(directory, parts)
    (directory / "optimizer.pt").write_bytes(b"of no use")
    refused(
        directory, "pickled weights are not loaded: rerank-fast convert --model .* --output DIR"
    )
    assert main(["convert", "--model", str(directory), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("converted") == parts
    np.testing.assert_array_equal(
        CrossEncoder(tmp_path / "out", device="cpu").predict(PAIRS), expected
    )
    assert not [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".bin", ".pt")]


def test_an_encoder_gets_no_head_by_it(directory: Path, tmp_path: Path):
    file = directory / "model.safetensors"
    tensors = {
        name.removeprefix("bert."): one
        for name, one in load_file(file).items()
        if name.startswith("bert.")
    }
    file.unlink()
    # Memory that is shared.
    tensors["embeddings.tied"] = tensors["embeddings.word_embeddings.weight"]
    torch.save(tensors, directory / "pytorch_model.bin")
    assert main(["convert", "--model", str(directory), "--output", str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_modules_are_converted_too(tmp_path: Path):
    peer = make_peer(tmp_path, ettin())
    to_pickles(tmp_path / "model")
    assert (
        main(["convert", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
        == 0
    )
    scores = CrossEncoder(tmp_path / "out", device="cpu").predict(PAIRS)
    np.testing.assert_allclose(scores, peer.predict(PAIRS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "content",
    ["code", "a pickle of old", "a list", "numbers", "damaged", "empty", "sparse", "meta"],
)
def test_what_is_more_than_tensors_is_refused_and_not_run(
    directory: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture
):
    tensors, file, marker = (
        load_file(directory / "model.safetensors"),
        directory / "pytorch_model.bin",
        tmp_path / "ran",
    )
    (directory / "model.safetensors").unlink()
    if content == "code":
        file.write_bytes(pickle.dumps({**tensors, "x": Payload(marker)}))
        said = "can't be read as tensors alone: it is damaged, or holds something else"
    elif content == "a pickle of old":
        torch.save({**tensors, "x": Payload(marker)}, file)
        said = "can't be read as tensors alone: it names "
    elif content == "damaged":
        torch.save(tensors, file)
        file.write_bytes(file.read_bytes()[:500])
        said = "can't be read as tensors alone: "
    elif content == "empty":
        file.write_bytes(b"")
        said = "can't be read as tensors alone: "
    else:
        more: dict[str, Any] = {
            "numbers": {"step": 3},
            "sparse": {"x": torch.eye(2).to_sparse()},
            "meta": {"x": torch.zeros(2, device="meta")},
        }
        torch.save([1, 2] if content == "a list" else tensors | more[content], file)
        said = "expected tensors by name" if content == "a list" else "expected a "
    assert main(["convert", "--model", str(directory), "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert "pytorch_model.bin" in printed
    assert said in printed
    assert "weights_only" not in printed  # torch's advice to run the code
    assert printed.count("\n") == 1
    assert not marker.exists()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("head", [None, "modular"])
def test_safetensors_beside_a_pickle_are_the_model(
    directory: Path, tmp_path: Path, head: str | None, capsys: pytest.CaptureFixture
):
    """What a run that began with a pickle has written beside it."""
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    halves = {key: one / 2 for key, one in load_file(directory / "model.safetensors").items()}
    torch.save(halves, directory / "pytorch_model.bin")
    flags = ["--head", head] if head else []
    command = ["convert", "--model", str(directory), "--output", str(tmp_path / "out"), *flags]
    assert main(command) == (0 if head else 2)
    if head is None:
        assert "there are safetensors of them, which are what is opened" in capsys.readouterr().err
        return
    scores = CrossEncoder(tmp_path / "out", device="cpu").predict(PAIRS)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_a_heads_fault_is_said_of_it_too(directory: Path, tmp_path: Path, capsys: Any):
    to_pickles(directory)
    flags = ["--output", str(tmp_path / "out"), "--head", "classification"]
    assert main(["convert", "--model", str(directory), *flags]) == 2
    assert f"error: {directory} has a classification head already" in capsys.readouterr().err


def test_a_fault_of_the_weights_is_said_of_the_directory_that_has_it(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    tensors["classifier.weight"].fill_(torch.nan)
    torch.save(tensors, directory / "pytorch_model.bin")
    assert main(["convert", "--model", str(directory), "--output", str(tmp_path / "out")]) == 2
    said = (
        f"opens as no reranker: {directory}: the weight classifier.weight has a value that is NaN"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["no pickles", "no directory", "output holds a model"])
def test_nothing_to_convert(
    directory: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture
):
    source, output = directory, tmp_path / "out"
    if fault == "no directory":
        source = Path("somebody/model")
    elif fault == "output holds a model":
        shutil.copytree(directory, output)
    assert main(["convert", "--model", str(source), "--output", str(output)]) == 2
    expected = {
        "no pickles": "has no pickled weights (pytorch_model.bin) to convert",
        "no directory": "expected a local model directory, got somebody/model",
        "output holds a model": "already holds a model or a README.md; --overwrite replaces it",
    }
    assert expected[fault] in capsys.readouterr().err

"""Weights that are damaged, of no numbers, pickled or outside: one line, and nothing else is
read.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch

from rerank_fast import CrossEncoder
from tests.model.storage.damage import PAIRS, edit, edit_weights, refused, shard


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_truncated_weights_are_named(directory: Path, keep: int):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(directory, r"model\.safetensors is damaged or no safetensors file")


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, b"\x08" + b"\0" * 7 + b"no json!", b"\x02" + b"\0" * 7 + b"{}"]
)
def test_weights_with_another_header(directory: Path, header: bytes):
    file = directory / "model.safetensors"
    file.write_bytes(header + file.read_bytes()[len(header) :])
    refused(directory, r"model\.safetensors is damaged or no safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(directory: Path, value: float, dtype: torch.dtype):
    name = "bert.encoder.layer.1.output.dense.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[name][-1, -1] = value

    edit_weights(directory, change)
    edit(directory, "config.json", dtype=str(dtype).removeprefix("torch."))
    what = "NaN" if np.isnan(value) else "infinite"
    refused(directory, f"the weight {name} has a value that is {what}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize(
    "name", ["classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"]
)
def test_weights_of_integers(directory: Path, name: str, dtype: torch.dtype):
    edit_weights(directory, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(directory, rf"the weight {name} is of the type \w+; expected a float type")


def test_all_weights_of_integers(directory: Path):
    edit_weights(
        directory, lambda all: all.update({name: one.to(torch.int32) for name, one in all.items()})
    )
    edit(directory, "config.json", dtype=None)
    refused(directory, r"weight")


def test_position_ids_of_older_checkpoints_are_integers(directory: Path):
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    name = "bert.embeddings.position_ids"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.arange(64)[None]}))
    np.testing.assert_array_equal(CrossEncoder(directory, device="cpu").predict(PAIRS), expected)


def test_a_weight_of_another_shape_is_named(directory: Path):
    edit_weights(
        directory, lambda tensors: tensors.update({"classifier.weight": torch.zeros(1, 31)})
    )
    refused(directory, r"classifier\.weight is \(1, 31\) in the weights and \(1, 32\) in the model")


def test_sharded_weights(directory: Path):
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    shard(directory, {})
    np.testing.assert_array_equal(CrossEncoder(directory, device="cpu").predict(PAIRS), expected)
    file = directory / "model-2-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(directory, r"model-2-of-2\.safetensors is damaged")
    file.unlink()
    refused(
        directory,
        r"has no model-2-of-2\.safetensors, which its model\.safetensors\.index\.json names",
    )


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": None},
        {"weight_map": {}},
        {"weight_map": ["model-1-of-2.safetensors"]},
        {"weight_map": {"classifier.weight": 3}},
        {"weight_map": {"classifier.weight": ""}},
        {"metadata": None},
        {"metadata": 3},
    ],
    ids=str,
)
def test_an_index_that_is_none(directory: Path, index: dict[str, Any]):
    shard(directory, {}, **index)
    refused(directory, r"model\.safetensors\.index\.json")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "{outside}",
        "inner/../../outside.safetensors",
        "..\\outside.safetensors",
    ],
)
def test_an_index_that_leads_out_of_the_directory(directory: Path, name: str):
    outside = directory.parent / "outside.safetensors"
    shard(directory, {"model-2-of-2.safetensors": name.format(outside=outside)})
    shutil.move(directory / "model-2-of-2.safetensors", outside)
    refused(directory, r"model\.safetensors\.index\.json leads out of the model's directory")


class Payload:
    """What a pickle does when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("place", ["index", "config", "adapter"])
def test_pickled_weights_are_never_touched(directory: Path, tmp_path: Path, place: str):
    marker = tmp_path / "ran"
    name = {"index": "model-2-of-2.bin"}.get(place, "adapter_model.bin")
    (directory / name).write_bytes(pickle.dumps(Payload(marker)))
    before = (directory / name).stat().st_atime_ns
    if place == "index":
        shard(directory, {"model-2-of-2.safetensors": name})
    elif place == "config":
        edit(directory, "config.json", transformers_weights=name)
    else:
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "x", "target_modules": ["query"]}
        (directory / "adapter_config.json").write_text(json.dumps(adapter))
    refused(directory, "pickled (weights|ones) are not loaded")
    assert not marker.exists()
    assert (directory / name).stat().st_atime_ns == before


@pytest.mark.parametrize("file", ["config.json", "modules.json", "tokenizer_config.json"])
def test_other_names_that_lead_out_of_the_directory(
    directory: Path, whole_causal: Path, tmp_path: Path, file: str
):
    if file == "config.json":
        shutil.copy(directory / "model.safetensors", tmp_path / "outside.safetensors")
        edit(directory, file, transformers_weights="../outside.safetensors")
    elif file == "tokenizer_config.json":
        shutil.copy(directory / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
        edit(directory, file, fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    else:
        directory = Path(shutil.copytree(whole_causal, tmp_path / "causal"))
        shutil.copytree(directory / "1_LogitScore", tmp_path / "outside")
        modules = json.loads((directory / file).read_text())
        modules[1]["path"] = "../outside"
        (directory / file).write_text(json.dumps(modules))
    refused(directory, rf"{file} leads out of the model's directory")


@pytest.fixture
def cached(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of somebody/model in the hub's cache, which is all that there is of the hub."""
    repository = tmp_path / "cache" / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(directory, repository / "snapshots" / ("a" * 40)))


def test_a_model_of_the_hub_is_checked_like_a_directory(cached: Path, directory: Path):
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    np.testing.assert_array_equal(
        CrossEncoder("somebody/model", device="cpu").predict(PAIRS), expected
    )
    shard(cached, {})
    np.testing.assert_array_equal(
        CrossEncoder("somebody/model", device="cpu").predict(PAIRS), expected
    )
    index = cached / "model.safetensors.index.json"
    content = index.read_text()
    shutil.copy(cached / "model-2-of-2.safetensors", cached.parent / "outside.safetensors")
    index.write_text(content.replace("model-2-of-2.safetensors", "../outside.safetensors"))
    with pytest.raises(
        ValueError, match=r"somebody/model/model\.safetensors\.index\.json leads out of"
    ):
        CrossEncoder("somebody/model", device="cpu")
    index.write_text(content)
    (cached / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="somebody/model has no tokenizer"):
        CrossEncoder("somebody/model", device="cpu")
    edit(cached, "config.json", hidden_size="32")
    with pytest.raises(
        ValueError, match=r"somebody/model/config\.json can't be read as a model's: .*hidden_size"
    ):
        CrossEncoder("somebody/model", device="cpu")


def test_a_weight_that_a_narrower_dtype_does_not_hold(directory: Path):
    edit_weights(directory, lambda tensors: tensors["classifier.weight"].fill_(1e5))
    assert np.isfinite(CrossEncoder(directory, device="cpu").predict(PAIRS)).all()
    with pytest.raises(
        ValueError, match=r"classifier\.weight has a value that is infinite in float16"
    ):
        CrossEncoder(directory, device="cpu", dtype="float16")


@pytest.mark.parametrize(
    "stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "others", [r"LayerNorm", r"classifier", r"word_embeddings|layer\.1", r"^$"]
)
@pytest.mark.parametrize("said", [None, "float32", "bfloat16", "float16"])
def test_files_of_any_and_of_several_dtypes(
    directory: Path, stored: torch.dtype, others: str, said: str | None
):
    """Weights are those of the file, in the one dtype of the config or of the file's first
    weights.
    """
    expected = CrossEncoder(directory, device="cpu").predict(PAIRS)
    edit_weights(
        directory,
        lambda tensors: tensors.update(
            {name: one.to(stored) for name, one in tensors.items() if not re.search(others, name)}
        ),
    )
    edit(directory, "config.json", dtype=said)
    model = CrossEncoder(directory, device="cpu")
    assert len({one.dtype for one in model.parameters()}) == 1
    np.testing.assert_allclose(model.predict(PAIRS), expected, atol=5e-3)

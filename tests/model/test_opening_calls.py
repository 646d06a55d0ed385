"""A CrossEncoder is opened, read and saved by what sentence-transformers calls these things."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn

from rerank_fast import CrossEncoder
from rerank_fast.model.storage.files import Checkpoint
from tests.model_factory import make_tiny_bert

PAIRS = [("what is a panda", "a bear"), ("rain", ""), ("the sea", "the wind and the rain in paris")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("models")
    peer = PeerCrossEncoder(str(make_tiny_bert(root / "bert")), device="cpu")
    peer.prompts = {"web": "query about ", "none": ""}
    peer.save_pretrained(str(root / "saved"))
    return str(root / "saved")


OPTIONS: dict[str, dict[str, Any]] = {
    "model_name_or_path": {},
    "labels": {"num_labels": 1},
    "no labels": {"num_labels": None},
    "prompts": {"prompts": {"web": "rain ", "mine": "sea "}, "default_prompt_name": "mine"},
    "a saved prompt": {"default_prompt_name": "web"},
    "max_length": {"max_length": 8},
    "tokenizer_kwargs": {"tokenizer_kwargs": {"model_max_length": 8}},
    "processor_kwargs": {"processor_kwargs": {"truncation_side": "left", "model_max_length": 8}},
    "dtype": {"model_kwargs": {"dtype": torch.float64}},
    "torch_dtype": {"model_kwargs": {"torch_dtype": "float64"}},
    "auto": {"model_kwargs": {"torch_dtype": "auto"}},
    "attention": {"model_kwargs": {"attn_implementation": "eager"}},
    "automodel_args": {"automodel_args": {"attn_implementation": "eager"}},
    "config": {"config_kwargs": {"layer_norm_eps": 0.1, "num_labels": 1}},
    "classifier_dropout": {"classifier_dropout": 0.3},
    "activation": {"activation_fn": nn.Tanh()},
    "older activation": {"default_activation_function": nn.Tanh()},
    "cache": {"cache_folder": None, "local_files_only": True, "token": False, "revision": None},
    "fp32": {"keep_in_fp32_modules": ["0.model.classifier"]},
    "backend": {"backend": "torch", "trust_remote_code": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_what_they_do_there(name: str, path: str):
    ours, theirs = (
        kind(model_name_or_path=path, device="cpu", **OPTIONS[name])
        for kind in (CrossEncoder, PeerCrossEncoder)
    )
    expected = theirs.predict(PAIRS)
    np.testing.assert_allclose(ours.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    for attribute in ("dtype", "max_seq_length", "prompts", "default_prompt_name", "num_labels"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert ours.keep_in_fp32_modules == theirs.keep_in_fp32_modules
    assert ours.config.classifier_dropout == theirs.config.classifier_dropout
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert type(ours.activation_fn) is type(theirs.activation_fn)


def test_places_of_older_releases(path: str):
    ours = CrossEncoder(path, 1, 8, nn.Tanh(), "cpu")
    theirs = PeerCrossEncoder(path, 1, 8, nn.Tanh(), "cpu")
    assert ours.max_length == 8
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS), rtol=1e-5)


def test_each_of_their_options_has_an_answer():
    """Taken or refused by name: none ends in words that say nothing."""
    theirs = set(inspect.signature(PeerCrossEncoder.__init__).parameters)
    ours = set(inspect.signature(CrossEncoder.__init__).parameters)
    refused = {"modules", "model_card_data", "backend"}
    assert theirs - ours == refused | {"model_name_or_path"}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"modules": [nn.Linear(1, 1)]}, ValueError, "expected no modules: save them"),
        ({"model_card_data": {}}, ValueError, "no model_card_data: set card_metadata"),
        ({"backend": "onnx"}, ValueError, "expected backend='torch', got 'onnx': rerank-fast exp"),
        ({"num_labels": 3}, ValueError, "expected num_labels=1, got 3"),
        ({"config_kwargs": {"num_labels": 2}}, ValueError, "expected num_labels=1, got 2"),
        ({"model_kwargs": {"device_map": "auto"}}, ValueError, "model_kwargs: .* got device_map"),
        ({"model_kwargs": {"use_safetensors": False}}, ValueError, "use_safetensors must be True"),
        ({"model_kwargs": {"dtype": "float7"}}, ValueError, "dtype must be .* got 'float7'"),
        ({"model_kwargs": {"dtype": "float64"}, "dtype": "float32"}, ValueError, "one dtype"),
        ({"model_kwargs": {"attn_implementation": "x"}}, ValueError, "can't be opened"),
        (
            {"default_prompt_name": "no"},
            ValueError,
            "CrossEncoder names the default prompt no, but has",
        ),
        ({"prompts": {"a": 1}}, ValueError, "prompt 'a': expected a string, got int 1"),
        ({"prompts": ["a"]}, ValueError, "expected prompts to be texts by name"),
        ({"config_kwargs": "x"}, ValueError, "config_kwargs: expected options by name, got str"),
        (
            {"processor_kwargs": {"model_max_length": 2}},
            ValueError,
            "processor_kwargs: expected model_max_length to be at least 4, got int 2",
        ),
        ({"keep_in_fp32_modules": ["0.x"]}, ValueError, "names 0.x, which is no nn.Linear"),
        ({"path_or_hub_id": "x"}, TypeError, "path_or_hub_id"),
        ({"model_name": "x"}, TypeError, "path_or_hub_id"),
        ({"tokenizer_args": {}, "processor_kwargs": {}}, TypeError, "got processor_kwargs twice"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
    ids=str,
)
def test_what_is_not_served_is_said(
    options: dict[str, Any], kind: type[Exception], message: str, path: str
):
    with pytest.raises(kind, match=message) as error:
        CrossEncoder(path, device="cpu", **options)
    assert "\n" not in str(error.value)


def test_the_hubs_cache_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []

    def file(checkpoint: Checkpoint, name: str) -> None:
        asked.append(checkpoint.hub)

    monkeypatch.setattr(Checkpoint, "file", file)
    with pytest.raises(ValueError, match=r"model nobody/nothing is no local directory"):
        CrossEncoder("nobody/nothing", cache_folder=str(tmp_path), local_files_only=True)
    assert str(tmp_path) != HF_HUB_CACHE
    assert all(one["cache_dir"] == str(tmp_path) and one["local_files_only"] for one in asked)
    assert asked


NAMES: dict[str, Callable[[Any], Any]] = {
    name: lambda model, name=name: getattr(model, name)  # type: ignore[misc]
    for name in ("max_length", "max_seq_length", "device", "dtype", "num_labels", "model_type",
                 "backend", "prompts", "default_prompt_name")
}  # fmt: skip
NAMES |= {
    "config": lambda model: model.config.to_dict(),
    "processor": lambda model: model.processor is model.tokenizer,
    "transformers_model": lambda model: model.transformers_model is model.model,
    "activation": lambda model: type(model.default_activation_function),
    "get_max_seq_length": lambda model: model.get_max_seq_length(),
    "get_backend": lambda model: model.get_backend(),
    "to": lambda model: model.to("cpu") is model and model.cpu() is model,
    "eval": lambda model: model.eval().training,
    "half": lambda model: (model.half().dtype, model.float().dtype),
    "own device": lambda model: model.predict(PAIRS, device="cpu").shape,
    "evaluate": lambda model: model.evaluate(lambda one, path=None: {"a": one is model}),
    "on a tokenizer": lambda model: sorted(model.tokenizer("a", "b", return_tensors="pt")),
    "the model called": lambda model: (
        model.model(**model.tokenizer("rain", "the sea", return_tensors="pt")).logits.shape
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_code_reads(name: str, path: str):
    ours, theirs = CrossEncoder(path, device="cpu"), PeerCrossEncoder(path, device="cpu")
    found, expected = NAMES[name](ours), NAMES[name](theirs)
    if name == "config":
        ignored = {"dtype", "_name_or_path"}
        found, expected = (
            {key: one for key, one in config.items() if key not in ignored}
            for config in (found, expected)
        )
    assert found == expected


def test_names_that_code_sets(path: str):
    for model in (CrossEncoder(path, device="cpu"), PeerCrossEncoder(path, device="cpu")):
        model.max_seq_length = 7
        assert model.max_length == 7
        model.activation_fn = None
        raw = model.predict(PAIRS)
        np.testing.assert_array_equal(raw, model.predict(PAIRS, activation_fn=nn.Identity()))
    ours = CrossEncoder(path, device="cpu")
    ours.set_activation_fn(nn.Tanh())
    assert isinstance(ours.activation_fn, nn.Tanh)


def test_no_activation_is_saved_as_none(path: str, tmp_path: Path):
    model = CrossEncoder(path, device="cpu")
    model.activation_fn, model.card = None, None
    model.save(tmp_path / "saved", "mine/reranker", safe_serialization=True)
    settings = json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text())
    assert settings["activation_fn"] == "torch.nn.modules.linear.Identity"
    assert "mine/reranker" in (tmp_path / "saved" / "README.md").read_text()
    raw = model.predict(PAIRS)
    for kind in (CrossEncoder, PeerCrossEncoder):
        again = kind(str(tmp_path / "saved"), device="cpu")
        np.testing.assert_allclose(again.predict(PAIRS), raw, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="safe_serialization=True"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def test_given_prompts_are_saved(path: str, tmp_path: Path):
    model = CrossEncoder(path, device="cpu", prompts={"mine": "sea "}, default_prompt_name="mine")
    model.save_pretrained(tmp_path / "saved")
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    assert again.prompts == {"web": "query about ", "none": "", "mine": "sea "}
    np.testing.assert_array_equal(again.predict(PAIRS), model.predict(PAIRS))


@pytest.mark.parametrize("name", ["fit", "start_multi_process_pool", "add_adapter", "load_adapter"])
def test_what_is_done_elsewhere_is_said(name: str, path: str):
    model = CrossEncoder(path, device="cpu")
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=f"CrossEncoder has no {name}: "):
        getattr(model, name)

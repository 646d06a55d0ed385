"""Damaged CrossEncoders of modules: one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.cross_encoder.modules import Dense
from sentence_transformers.sentence_transformer.modules import CNN, LSTM
from torch import nn

from rerank_fast import CrossEncoder
from tests.model.modular_factory import PAIRS, ettin, make_peer, score
from tests.model.storage.damage import edit, refused


@pytest.fixture(scope="module")
def whole_modular(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_peer(root, ettin("cls"), "bert")
    return root / "model"


@pytest.fixture
def modular(whole_modular: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_modular, tmp_path / "model"))


def edit_module(directory: Path, number: int, **changes: Any) -> None:
    modules = json.loads((directory / "modules.json").read_text())
    modules[number].update(changes)
    (directory / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("1_Pooling", {"pooling_mode": "median"}, "expected pooling modes of cls, max, mean"),
        ("1_Pooling", {"pooling_mode": []}, "expected pooling modes of"),
        ("1_Pooling", {"pooling_mode": 3}, "1_Pooling"),
        ("2_Dense", {"in_features": "wide"}, "2_Dense"),
        ("2_Dense", {"in_features": 48}, "weight is .* in the weights and .* by the config"),
        ("2_Dense", {"in_features": None}, "2_Dense"),
        (
            "2_Dense",
            {"bias": False},
            "expected the weights linear.weight, got linear.bias, linear.weight",
        ),
        (
            "2_Dense",
            {"use_residual": True, "in_features": 16},
            "expected the weights .*residual.weight",
        ),
        (
            "2_Dense",
            {"activation_function": "os.system"},
            "expected an activation of torch.nn, got str 'os.system'",
        ),
        (
            "2_Dense",
            {"activation_function": "torch.nn.modules.activation.None"},
            "which torch can't give",
        ),
        ("2_Dense", {"activation_function": 3}, "expected an activation of torch.nn, got int 3"),
        (
            "2_Dense",
            {"module_input_name": "nothing"},
            "the modules give no score: KeyError: 'nothing'",
        ),
        ("3_LayerNorm", {"dimension": 31}, "by the config"),
        (
            "4_Dense",
            {"module_output_name": "other"},
            "the modules give no score: KeyError: 'scores'",
        ),
    ],
    ids=str,
)
def test_configs_of_modules(modular: Path, folder: str, changes: dict[str, Any], message: str):
    edit(modular, f"{folder}/config.json", **changes)
    refused(modular, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "../outside"}, "leads out of the model's directory"),
        ({"path": ""}, "expected a path for the module"),
        ({"kwargs": 3}, "expected kwargs to be a list of names, got int 3"),
        ({"path": "9_Missing"}, r"expected pooling modes|9_Missing"),
        (
            {"type": "somebodys.modules.Dense"},
            "has the module somebodys.modules.Dense: expected sentence-tran",
        ),
        ({"type": "sentence_transformers.no_such.Module"}, "no_such.Module of .* can't be loaded"),
        ({"type": "sentence_transformers.util.fullname"}, "can't be loaded: it is no module"),
    ],
    ids=str,
)
def test_entries_of_modules(modular: Path, changes: dict[str, Any], message: str):
    edit_module(modular, 2, **changes)
    refused(modular, message)


def test_a_transformer_of_somebodys_own_is_not_read_as_theirs(modular: Path):
    (modular / "custom_st.py").write_text("raise SystemExit")
    edit_module(modular, 0, type="custom_st.Transformer")
    refused(modular, "has the module custom_st.Transformer: expected sentence-transformers' own")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformer_task": "fill-mask"},
            "expected the transformer_task feature-extraction, got str 'fill-mask'",
        ),
        ({"processing_kwargs": {"text": {"stride": 8}}}, "expected processing_kwargs of text"),
        ({"processing_kwargs": {"common": {"a": 1}}}, "expected processing_kwargs of text alone"),
        ({"processing_kwargs": 3}, "expected processing_kwargs of text alone"),
        ({"processing_kwargs": {"text": {"truncation": False}}}, "truncation that are true"),
        ({"processing_kwargs": {"text": {"max_length": 0}}}, "max_length to be at least 4, got"),
        ({"modality_config": 3}, "expected a modality_config of objects, got int 3"),
        ({"modality_config": {"text": 3}}, "expected a modality_config of objects, got dict"),
        ({"query_expansion": {"strategy": "fixed"}}, "query_expansion is not supported"),
        (
            {"modality_config": {"text": {"method": "encode"}}},
            "expected the output last_hidden_state of the method",
        ),
        (
            {"module_output_name": "embeddings"},
            "the modules give no score: KeyError: 'token_embeddings'",
        ),
    ],
    ids=str,
)
def test_settings_of_the_transformer(modular: Path, changes: dict[str, Any], message: str):
    edit(modular, "sentence_bert_config.json", **changes)
    refused(modular, message)


@pytest.mark.parametrize(
    "names", [3, ["nothing"], ["1.linear"], ["2"], ["0.model.embeddings"], [3]], ids=str
)
def test_layers_in_fp32_that_are_none(modular: Path, names: Any):
    edit(modular, "config_sentence_transformers.json", keep_in_fp32_modules=names)
    refused(modular, "keep_in_fp32_modules")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((32, 32), torch.nan), "linear.weight has values that are no finite floats"),
        (
            torch.ones(32, 32, dtype=torch.int32),
            "linear.weight has values that are no finite floats",
        ),
        (torch.ones(31, 32), r"linear.weight is \(31, 32\) in the weights"),
    ],
)
def test_weights_of_modules(modular: Path, values: torch.Tensor, message: str):
    file = modular / "2_Dense" / "model.safetensors"
    save_file({**load_file(file), "linear.weight": values}, file)
    refused(modular, message)


def test_pickled_weights_of_a_module_are_not_loaded(modular: Path):
    file = modular / "2_Dense" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    refused(modular, "2_Dense has pickled weights, which are not loaded: rerank-fast convert")


def test_a_damaged_file_of_a_module(modular: Path):
    file = modular / "4_Dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    refused(modular, r"4_Dense/model.safetensors is damaged")


@pytest.mark.parametrize("theirs", [False, True])
def test_two_scores_are_refused(theirs: bool, tmp_path: Path):
    head = [CNN(32, 16, [1, 1]), *ettin("cls")] if theirs else ettin("cls")
    head[-1] = Dense(32, 2, activation_function=nn.Identity(), module_output_name="scores")
    make_peer(tmp_path, head, "bert", num_labels=2)
    refused(tmp_path / "model", "has 2 labels; expected modules that give 1 score")


def test_a_score_for_each_token_is_refused(tmp_path: Path):
    make_peer(tmp_path, [score(module_input_name="token_embeddings")], "bert")
    refused(tmp_path / "model", r"scores of the shape \(2, 2, 1\) for 2 texts; expected \(2, 1\)")


def test_modules_that_want_what_a_transformer_does_not_give(tmp_path: Path):
    make_peer(tmp_path, [LSTM(32, 16), *ettin("cls")], "bert")
    refused(tmp_path / "model", "the modules give no score: KeyError: 'sentence_lengths'")


def test_without_sentence_transformers_what_is_theirs_alone_is_named(
    modular: Path, monkeypatch: pytest.MonkeyPatch
):
    import sys

    edit_module(modular, 3, type="sentence_transformers.sentence_transformer.modules.cnn.CNN")
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modules", None)
    refused(modular, "modules.cnn.CNN, which needs pip install sentence-transformers")


def test_a_limit_of_the_transformer_holds(modular: Path):
    edit(modular, "sentence_bert_config.json", max_seq_length=9)
    model = CrossEncoder(modular, device="cpu")
    assert model.max_length == 9
    assert model.tokenize(PAIRS).lengths.max() == 9

"""Configs and sentence-transformers' files that are damaged or hold something else than is
expected.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rerank_fast import CrossEncoder
from tests.model.storage.damage import edit, refused

_OLD_NAME = "sbert_ce_default_activation_function"


@pytest.mark.parametrize("name", ["", "/no/such", "./no", "a/b/c", "two words"])
def test_a_name_that_is_neither_a_directorys_nor_the_hubs(name: str):
    shown = name or "''"
    with pytest.raises(
        ValueError, match=f"model directory {shown} does not exist, and it is no hub"
    ):
        CrossEncoder(name)


def test_a_file_in_place_of_a_directory(tmp_path: Path):
    for file in (tmp_path / "lists.jsonl", Path("/dev/null")):
        if file.parent == tmp_path:
            file.write_text("{}")
        with pytest.raises(ValueError, match=f"with a config.json, got the file {file}"):
            CrossEncoder(file)


@pytest.mark.parametrize(
    "name", ["config.json", "config_sentence_transformers.json", "modules.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"3", b'"text"', b"null", b"\xff\xfe{", b"[" * 100_000]
)
def test_files_that_are_no_json_or_of_another_kind(directory: Path, name: str, content: bytes):
    (directory / name).write_bytes(content)
    refused(directory, name.replace(".", r"\."))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"hidden_size": -32},
        {"hidden_size": "32"},
        {"hidden_size": 48},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_hidden_layers": None},
        {"intermediate_size": 65},
        {"vocab_size": 7},
        {"hidden_act": "no such"},
        {"hidden_act": 3},
        {"hidden_dropout_prob": "much"},
        {"max_position_embeddings": "64"},
        {"max_position_embeddings": [64]},
        {"dtype": "no such"},
        {"dtype": "int8"},
        {"dtype": "Tensor"},
        {"dtype": 3},
        {"torch_dtype": "complex64", "dtype": None},
        {"model_type": "no such"},
        {"model_type": 3},
        {"architectures": 3},
        {"architectures": [3]},
        {"architectures": {"a": "BertForSequenceClassification"}},
        {"id2label": {"x": "a"}},
        {"id2label": 3},
        {"sentence_transformers": 3},
        {"quantization_config": 3},
    ],
    ids=str,
)
def test_configs_of_no_model(directory: Path, changes: dict[str, Any]):
    edit(directory, "config.json", **changes)
    refused(directory, r"config\.json")


@pytest.mark.parametrize(
    "modules",
    [[1, 2], ["Transformer"], [{}], [{"type": 3}], [None], {"type": "Transformer"}, 3],
    ids=str,
)
def test_modules_that_are_none(directory: Path, modules: Any):
    (directory / "modules.json").write_text(json.dumps(modules))
    refused(directory, r"modules\.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "query: "}, "expected prompts to be texts by name, got str 'query: '"),
        ({"prompts": ["query: "]}, "expected prompts to be texts by name, got list"),
        ({"prompts": {"query": 3}}, "prompt 'query': expected a string, got int 3"),
        ({"prompts": {"query": "\ud800"}}, "prompt 'query': not valid Unicode"),
        ({"default_prompt_name": "none"}, "names the default prompt none, but has"),
        ({"default_prompt_name": ["a"]}, "names the default prompt"),
        ({"activation_fn": 3}, "expected the name of an activation, got int 3"),
        (
            {"activation_fn": "torch.nn.modules.activation.Sigmoidal"},
            "Sigmoidal, which torch can't give",
        ),
        (
            {"activation_fn": "torch.nn.modules.no_such.Sigmoid"},
            "no_such.Sigmoid, which torch can't give",
        ),
        ({"activation_fn": "torch.nn.modules.linear.Linear"}, "Linear, which torch can't give"),
        (
            {"activation_fn": "torch.nn.modules.container.ModuleList"},
            "ModuleList, which torch can't give",
        ),
        ({"activation_fn": "torch.nn.modules.activation.Tensor"}, "Tensor, which torch can't give"),
    ],
)
def test_settings_of_sentence_transformers(directory: Path, changes: dict[str, Any], message: str):
    edit(directory, "config_sentence_transformers.json", **changes)
    refused(directory, rf"config_sentence_transformers\.json\b.*{message}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torch.nn.modules.linear.Identity", nn.Identity),
        ("torch.nn.Identity", nn.Identity),
        ("torch.nn.Tanh", nn.Tanh),
        # Whatever else a name leads to must not be run: the default, with one line in the log.
        ("no_such_package.Activation", nn.Sigmoid),
        ("Activation", nn.Sigmoid),
        ("transformers.activations.NewGELUActivation", nn.Sigmoid),
        ("torch.sigmoid", nn.Sigmoid),
    ],
)
@pytest.mark.parametrize("place", ["config.json", "config_sentence_transformers.json"])
def test_activations_by_name(
    directory: Path, name: str, kind: type[nn.Module], place: str, caplog: pytest.LogCaptureFixture
):
    edit(directory, "config_sentence_transformers.json", activation_fn=None)
    edit(directory, place, **{"activation_fn" if place != "config.json" else _OLD_NAME: name})
    assert type(CrossEncoder(directory, device="cpu").activation_fn) is kind
    assert ("is not one of torch.nn; using Sigmoid" in caplog.text) is (kind is nn.Sigmoid)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "expected true_token_id"),
        ({"true_token_id": 10**6}, "expected true_token_id"),
        ({"true_token_id": "yes"}, "expected true_token_id"),
        ({"true_token_id": 3, "false_token_id": -1}, "expected true_token_id"),
        ({"true_token_id": 3, "false_token_id": 4.5}, "expected true_token_id"),
        ([3, 4], "expected a JSON object"),
    ],
)
def test_answers_that_are_no_tokens(whole_causal: Path, tmp_path: Path, answers: Any, message: str):
    directory = Path(shutil.copytree(whole_causal, tmp_path / "model"))
    (directory / "1_LogitScore" / "config.json").write_text(json.dumps(answers))
    refused(directory, rf"1_LogitScore/config\.json: {message}")

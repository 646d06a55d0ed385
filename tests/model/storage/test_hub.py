"""Pushing to a local fake of the hub: what is uploaded, to whom it shows, and where the token
goes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub import ModelCard

from rerank_fast import CrossEncoder
from tests.fake_hub import FakeHub, serve_hub
from tests.model_factory import make_tiny_bert
from tests.training.conftest import make_lists

TOKEN = "hf_secretsecretsecretsecretsecretsecr"
REPO = "someone/tiny-reranker"


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("hub") / "bert")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub(TOKEN) as served:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield served


def test_a_pushed_model_is_private_whole_and_loads_again(
    hub: FakeHub, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    model = CrossEncoder(tiny_bert, device="cpu")
    model.card_metadata["license"] = "mit"
    url = model.push_to_hub(REPO, token=TOKEN)
    assert url.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert hub.visibility == {REPO: "private"}
    model.save_pretrained(tmp_path / "saved")
    assert hub.files[REPO].keys() == {file.name for file in (tmp_path / "saved").iterdir()}
    for name, content in hub.files[REPO].items():
        (tmp_path / "pulled").mkdir(exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
        assert TOKEN.encode() not in content
    pairs = [("what is the panda", "panda eats bamboo"), ("sea", "rain over the sea")]
    np.testing.assert_array_equal(
        CrossEncoder(tmp_path / "pulled").predict(pairs), model.predict(pairs)
    )
    card = ModelCard.load(tmp_path / "pulled" / "README.md")
    assert card.data.license == "mit"
    assert card.text.count(f'CrossEncoder("{REPO}")') == 2  # the code loads it from where it is
    assert TOKEN not in caplog.text
    # A second push goes to the same repository.
    model.push_to_hub(REPO, token=TOKEN)
    assert hub.unauthorized == 0


def test_public_only_when_asked(hub: FakeHub, tiny_bert: Path):
    CrossEncoder(tiny_bert, device="cpu").push_to_hub(REPO, private=False, token=TOKEN)
    assert hub.visibility == {REPO: "public"}


def test_refusals_are_one_line_and_hold_no_token(
    hub: FakeHub, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
):
    model = CrossEncoder(tiny_bert, device="cpu")
    wrong = TOKEN[::-1]
    with pytest.raises(ValueError, match=f"can't push to {REPO}: .*401") as refused:
        model.push_to_hub(REPO, token=wrong)
    assert wrong not in str(refused.value)
    assert not hub.files
    with pytest.raises(ValueError, match="can't push to not a repo"):
        model.push_to_hub("not a repo", token=TOKEN)
    model.card_metadata["license"] = "no-such-license"
    with pytest.raises(
        ValueError, match=r'Invalid metadata in README\.md\. - "license" must be one of'
    ):
        model.push_to_hub(REPO, token=TOKEN)
    assert not hub.files[REPO]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"can't push to {REPO}: the hub is offline"):
        model.push_to_hub(REPO, token=TOKEN)


def test_train_pushes_the_best_model_with_its_card_only_when_asked(tiny_bert: Path, tmp_path: Path):
    lists = tmp_path / "lists.jsonl"
    lists.write_text("".join(json.dumps(row) + "\n" for row in make_lists(12)))
    train = f"""
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from rerank_fast.cli import main
common = ["train", "--model", {str(tiny_bert)!r}, "--train", {str(lists)!r},
          "--eval", {str(lists)!r}, "--precision", "fp32",
          "--show_progress_bar", "false", "--batch_size", "6"]
assert main([*common, "--output", {str(tmp_path / "quiet")!r}]) == 0
print("nothing asked for", flush=True)
sys.exit(main([*common, "--output", {str(tmp_path / "pushed")!r}, "--push", {REPO!r}]))
"""
    with serve_hub(TOKEN) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", train], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        before, _, after = done.stdout.partition("nothing asked for")
        assert REPO not in before
        assert f"{hub.endpoint}/{REPO}/commit/" in after
        # The local model and data were read without the hub; it was asked first for the repository.
        assert (
            next(path for method, path in hub.requests if method == "POST") == "/api/repos/create"
        )
        assert hub.unauthorized == 0
        assert hub.visibility == {REPO: "private"}
        uploaded = hub.files[REPO]
    assert uploaded["model.safetensors"] == (tmp_path / "pushed" / "model.safetensors").read_bytes()
    card = uploaded["README.md"].decode()
    assert "loss:LambdaLoss" in card
    assert f'CrossEncoder("{REPO}")' in card
    assert not any(name.startswith("checkpoint") or name == "train_log.jsonl" for name in uploaded)
    if "training.png" in card:
        assert uploaded["training.png"].startswith(b"\x89PNG")
    assert TOKEN not in done.stdout + done.stderr
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file

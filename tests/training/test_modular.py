"""CrossEncoders of modules in the Trainer: every setting, and what it writes beside
sentence-transformers.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.training.events import TrainingInterrupted
from tests.model.modular_factory import HEADS, PAIRS, ettin, make_peer
from tests.training.conftest import config_for, make_lists

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"gradient_cache": "on"},
    "checkpointed": {"gradient_checkpointing": True, "gradient_cache": "on"},
    "averaged": {"ema_decay": 0.5},
    "bf16": {"precision": "bf16"},
    "bf16-pure": {"precision": "bf16-pure"},
    "lora": {"lora_rank": 4},
    "frozen": {"freeze_layers": 1, "layer_lr_decay": 0.9},
    "frozen head": {"freeze": ["head.*"]},
}


def train(directory: Path, callbacks: Sequence[Any] = (), **settings: Any) -> CrossEncoder:
    model = CrossEncoder(directory / "model", device="cpu")
    config = config_for(
        directory / "out", batch_size=2, learning_rate=1e-2, eval_steps=2, **settings
    )
    Trainer(model, make_lists(8), eval=make_lists(4), config=config, callbacks=callbacks).train()
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_trained_and_written(name: str, tmp_path: Path):
    peer = make_peer(tmp_path, ettin("cls"))
    before = CrossEncoder(tmp_path / "model", device="cpu").model.state_dict()
    model = train(tmp_path, **SETTINGS[name])
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    changed = {
        key.split(".")[0]
        for key in before
        if not torch.equal(before[key].float(), after[key].float())
    }
    assert changed == ({"encoder"} if name == "frozen head" else {"encoder", "head"})
    theirs = PeerCrossEncoder(str(tmp_path / "out"), device="cpu")
    assert [type(one) for one in theirs] == [type(one) for one in peer]
    expected = theirs.predict(PAIRS)
    again = CrossEncoder(tmp_path / "out", device="cpu")
    bound = 1e-5 if "bf16" not in name else 0.1
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=bound, atol=bound)
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=bound, atol=bound)
    assert np.abs(expected - peer.predict(PAIRS)).max() > 1e-3


def test_the_gradient_cache_gives_the_same_model_with_dropout(tmp_path: Path):
    make_peer(tmp_path, HEADS["dropout"]())
    runs = [
        train(tmp_path, gradient_cache=cache, overwrite=cache == "on") for cache in ("off", "on")
    ]
    weights = [model.model.state_dict() for model in runs]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_an_adapter_is_written_for_the_encoder_alone(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModel

    make_peer(tmp_path, ettin("cls"))
    train(tmp_path, lora_rank=4)
    encoder = AutoModel.from_pretrained(tmp_path / "model").eval()
    adapted = PeftModel.from_pretrained(
        encoder, str(tmp_path / "out" / "adapter")
    ).merge_and_unload()
    merged = AutoModel.from_pretrained(tmp_path / "out")
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], weight, rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path):
    make_peer(tmp_path, ettin("mean"))
    expected = train(tmp_path).predict(PAIRS)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, [_stop_at_2])
    again = train(tmp_path, resume="auto")
    np.testing.assert_array_equal(again.predict(PAIRS), expected)


def _stop_at_2(event: Any) -> None:
    if event.name == "step_end" and event.step == 2:
        signal.raise_signal(signal.SIGTERM)

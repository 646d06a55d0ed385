"""Tokens of a micro-batch where the settings don't say: found once, kept by a resumed run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.training import micro_batches, trainer
from rerank_fast.training.micro_batches import power_of_two, probe_max_tokens
from tests.training.conftest import config_for, weights


def a_model(device: str, width: int, layers: int) -> SimpleNamespace:
    config = SimpleNamespace(hidden_size=width, num_hidden_layers=layers)
    return SimpleNamespace(device=torch.device(device), model=SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("device", "gib", "width", "layers", "expected"),
    [
        ("cuda", 78, 384, 6, 65536),  # more would gain nothing
        ("cuda", 78, 1024, 24, 8192),  # 9.75 GiB at 816 KiB a token are 12529
        ("cuda", 8, 768, 12, 2048),  # 1 GiB at 306 KiB a token are 3426
        ("cuda", 1, 1024, 24, 512),
        ("cpu", 16, 384, 6, 4096),
        ("cpu", 8, 1024, 24, 1024),  # 1 GiB at 816 KiB a token are 1285
    ],
)
def test_free_memory_and_the_models_size_decide(
    device: str, gib: int, width: int, layers: int, expected: int, monkeypatch: pytest.MonkeyPatch
):
    for free in (gib * 2**30, gib * 2**30 - 10**7):  # not the last megabytes
        monkeypatch.setattr(micro_batches, "available_bytes", lambda _, free=free: free)
        assert probe_max_tokens(a_model(device, width, layers), torch.bfloat16) == expected


def test_all_processes_take_the_least_and_it_is_said_once(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    model = CrossEncoder(tiny_bert, device="cpu")
    with caplog.at_level(logging.INFO, "rerank_fast.training.micro_batches"):
        own = probe_max_tokens(model, torch.float32)
    assert [record.getMessage().split(" on ")[0] for record in caplog.records] == [
        f"max_tokens_per_microbatch: {own}"
    ]
    assert own == power_of_two(own) == probe_max_tokens(model, torch.float32)
    monkeypatch.setattr(micro_batches.collectives, "gather", lambda value: [value, 512, 2048])
    assert probe_max_tokens(model, torch.float32) == 512


def test_a_resumed_run_keeps_what_was_found(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With dropout: another cut of a batch would give other weights."""
    monkeypatch.setattr(trainer, "probe_max_tokens", lambda model, dtype: 64)
    whole = config_for(tmp_path / "whole", max_steps=4, save_steps=2)
    Trainer(tiny_bert, train_lists, config=whole).train()
    half = replace(whole, output=str(tmp_path / "half"))
    Trainer(tiny_bert, train_lists, config=half, callbacks=[stop_at_3]).train()
    monkeypatch.setattr(trainer, "probe_max_tokens", lambda model, dtype: 512)
    other = Trainer(
        tiny_bert, train_lists, config=replace(half, output=str(tmp_path / "other"), overwrite=True)
    )
    other.train()
    assert other.backward.max_tokens == 512
    resumed = Trainer(tiny_bert, train_lists, config=replace(half, resume="auto"))
    resumed.train()
    assert resumed.backward.max_tokens == 64
    a, b, c = (weights(tmp_path / name) for name in ("whole", "half", "other"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    chosen = Trainer(
        tiny_bert,
        train_lists,
        config=replace(half, resume="auto", overwrite=True, max_tokens_per_microbatch=32),
    )
    assert chosen.backward.max_tokens == 32


@pytest.mark.parametrize(("free_now", "kept"), [(0.9, True), (0.3, False)])
def test_a_resumed_run_keeps_its_memory_where_there_is_so_much(
    tiny_bert: Path, train_lists: Dataset, tmp_path: Path, free_now: float, kept: bool
):
    """By it gradient_cache "auto" chooses its mode."""
    config = config_for(tmp_path, max_steps=4, save_steps=2)
    first = Trainer(tiny_bert, train_lists, config=config, callbacks=[stop_at_3])
    first.train()
    resumed = Trainer(tiny_bert, train_lists, config=replace(config, resume="auto"))
    resumed.backward.memory = own = int(free_now * first.backward.memory)
    resumed.train()
    assert resumed.backward.memory == (first.backward.memory if kept else own)


def stop_at_3(event) -> None:
    if event.name == "step_end" and event.step == 3:
        event.trainer.stop()

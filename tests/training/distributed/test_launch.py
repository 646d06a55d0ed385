"""What accelerate launch hands on in the environment settles what the settings leave open."""

from __future__ import annotations

import re

import pytest

from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed.launch import settle

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "FSDP_VERSION")
SWITCHES = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, *SWITCHES):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_the_device_decides_and_there_are_no_shards():
    config, said = settle(TrainingConfig())
    assert (config.precision, config.sharding, said) == ("auto", "none", [])


@pytest.mark.parametrize(
    ("told", "precision"), [("no", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_accelerates_mixed_precision_is_taken_unless_one_is_set(
    told: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    config, said = settle(TrainingConfig())
    assert (config.precision, said) == (
        precision,
        [f"precision {precision} (mixed_precision {told})"],
    )
    config, said = settle(TrainingConfig(precision="bf16-pure"))
    assert (config.precision, said) == ("bf16-pure", [])


def test_fp8_is_refused_unless_a_precision_is_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed_precision must be one of no, bf16, fp16, got fp8"):
        settle(TrainingConfig())
    assert settle(TrainingConfig(precision="fp32"))[0].precision == "fp32"


def test_fsdp2_is_taken_and_what_is_not_done_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version must be 2, got 1"):
        settle(TrainingConfig())
    assert settle(TrainingConfig(sharding="none"))[0].sharding == "none"
    monkeypatch.setenv("FSDP_VERSION", "2")
    config, said = settle(TrainingConfig())
    assert (config.sharding, said) == ("fsdp2", ["sharding fsdp2"])
    for name in SWITCHES:
        monkeypatch.setenv(name, "true")
        with pytest.raises(ValueError, match=re.escape(f"{name.lower()} must be false")):
            settle(TrainingConfig())
        monkeypatch.delenv(name)

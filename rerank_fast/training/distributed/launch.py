"""What `accelerate launch` was told, where a run's settings leave it open."""

from __future__ import annotations

import os
from dataclasses import replace

from rerank_fast.training.config import TrainingConfig

_PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


def settle(config: TrainingConfig) -> tuple[TrainingConfig, list[str]]:
    """The settings with what a launcher decides in the place of "auto", and what it decided, to be
    said.

    Accelerate hands its settings (flags, or a file of `accelerate config`) on in the environment.

    Raises:
        ValueError: it was told something that this package does not do.
    """
    said = []
    if config.precision == "auto":
        told = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if told is not None and told not in _PRECISIONS:
            raise ValueError(
                f"accelerate's mixed_precision must be one of {', '.join(_PRECISIONS)}, got "
                f"{told}; or set precision itself"
            )
        if told is not None:
            config = replace(config, precision=_PRECISIONS[told])  # type: ignore[arg-type]
            said.append(f"precision {config.precision} (mixed_precision {told})")
    shards = _is_on("ACCELERATE_USE_FSDP")
    if shards:
        # Else transformers leaves weights and buffers of all processes but one empty, for
        # Accelerate to fill.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if config.sharding == "auto":
        if shards:
            _check_fsdp()
            said.append("sharding fsdp2")
        config = replace(config, sharding="fsdp2" if shards else "none")
    return config, said


def _check_fsdp() -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"accelerate's fsdp_version must be 2, got {version}; or set sharding to none"
        )
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "weights stay on their device"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "set gradient_checkpointing instead"),
    ):
        if _is_on(name):
            raise ValueError(f"accelerate's {name.lower()} must be false, got true: {instead}")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")

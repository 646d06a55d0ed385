"""What a run's `precision` comes to on its device."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from rerank_fast.model.precision.hardware import arithmetic, fastest, is_fast, why_slow
from rerank_fast.training import checkpoints
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import collectives

logger = logging.getLogger(__name__)

_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-pure": torch.bfloat16,
}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def settle(
    config: TrainingConfig, device: torch.device, resumed_from: Path | None
) -> TrainingConfig:
    """The settings with "auto" as what it comes to: the run's that goes on, else the fastest here.

    A named one that the CPU only emulates is kept, with one warning of what it costs. Every process
    must call it: all train in the first one's.

    Raises:
        ValueError: bf16 on a GPU that has none, whose kernels are not there.
    """
    precision: str = config.precision
    if precision == "auto":
        if resumed_from is not None:
            precision = _of(resumed_from)
        else:
            precision = collectives.gather(_NAMES[fastest(device)])[0]
        config = replace(config, precision=precision)  # type: ignore[arg-type]
    dtype = _DTYPES[precision]
    if device.type in ("cpu", "cuda") and precision != "fp32" and not is_fast(dtype, device):
        why = why_slow(dtype, device)
        if device.type == "cuda" and precision == "bf16":
            raise ValueError(f"precision must be fp16 or fp32 on {device}, got bf16: {why}")
        how = (
            "is computed in float32"
            if precision == "bf16-pure"
            else "is emulated, slower than fp32,"
        )
        logger.warning("precision %s %s on this processor: %s.", precision, how, why)
    return config


def _of(checkpoint: Path) -> str:
    values = checkpoints.load_values(checkpoint)
    try:
        precision = values["run"]["precision"]
    except (KeyError, TypeError):
        precision = None
    if precision not in _DTYPES:
        raise ValueError(
            f"checkpoint {checkpoint} must name its run's precision, got {precision!r}"
        )
    return precision


def products_in(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """What a run's settled precision multiplies in: what it names, but bf16-pure as its weights."""
    dtype = _DTYPES[config.precision]
    return arithmetic(dtype, device) if config.precision == "bf16-pure" else dtype

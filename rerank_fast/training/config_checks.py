"""What a TrainingConfig may hold; `check` is called when one is made."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from rerank_fast.objectives import check_name

if TYPE_CHECKING:
    from rerank_fast.training.config import TrainingConfig

# fp32's smallest normal number and its largest.
_TINY, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127

_AT_LEAST = {
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "shuffle_buffer": 1,
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "logging_steps": 1,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "skip_below": 0,
    "freeze_layers": 0,
    "lora_rank": 0,
    "in_batch_negatives": 0,
}
_NONE_OR_AT_LEAST = {
    "max_length": 4,
    "k": 0,
    "warmup_steps": 0,
    "mini_batch_size": 1,
    "max_tokens_per_microbatch": 1,
    "max_docs_per_list": 2,
    "early_stopping_patience": 1,
}
_ABOVE_0 = ("learning_rate", "adam_epsilon", "lora_alpha", "distributed_timeout")
_BELOW_1 = ("ema_decay", "lora_dropout", "adam_beta1", "adam_beta2")
_FP32 = {"sigma": _TINY, "eps": _TINY, "mu": 0.0}  # at least
_STRINGS = ("freeze", "trackers", "lora_target_modules")
_MAPPINGS = ("schedule_options", "optimizer_options", "objective_options")


def check(config: TrainingConfig) -> None:
    """Refuse a value that no run can have, and settings that exclude each other.

    Raises:
        ValueError: names the setting, what it may be and what it is.
    """
    _check_kinds(config)
    _check_ranges(config)
    _check_names(config)
    _check_together(config)
    _check_objective(config.objective, config.objective_options)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # nor a whole number that no float can be


_KINDS = {int: _is_integer, float: _is_finite, bool: lambda value: isinstance(value, bool)}


def _check_kinds(config: TrainingConfig) -> None:
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint in _KINDS and not _KINDS[hint](value):
            raise ValueError(f"{name} must be a finite {hint.__name__}, got {value!r}")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
    for name in _STRINGS:
        value = getattr(config, name)
        strings = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if value is not None and not strings:
            raise ValueError(f"{name} must be a list of strings, got {value!r}")
    for name in _MAPPINGS:
        if not isinstance(value := getattr(config, name), dict):
            raise ValueError(f"{name} must be a mapping of names to values, got {value!r}")


def _check_ranges(config: TrainingConfig) -> None:
    for name, least in _AT_LEAST.items():
        if not (value := getattr(config, name)) >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name, least in _NONE_OR_AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not (_is_integer(value) and value >= least):
            raise ValueError(
                f"{name} must be None or at least {least} and below 2**63, got {value!r}"
            )
    for name in _ABOVE_0:
        if not (value := getattr(config, name)) > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    for name in _BELOW_1:
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    for name, smallest in _FP32.items():
        if not smallest <= (value := getattr(config, name)) <= _LARGEST:
            bound = "above 0" if smallest else "of at least 0"
            raise ValueError(f"{name} must be a finite fp32 number {bound}, got {value}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2**32, got {config.seed}")
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(f"max_steps must be -1 or at least 1, got {config.max_steps}")
    if not 0 < config.layer_lr_decay <= 1:
        raise ValueError(
            f"layer_lr_decay must be above 0 and at most 1, got {config.layer_lr_decay}"
        )
    if not 0 <= config.warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio must be between 0 and 1, got {config.warmup_ratio}")


def _check_names(config: TrainingConfig) -> None:
    if not isinstance(config.resume, str) or not config.resume:
        raise ValueError(
            f"resume must be auto, never or a checkpoint's path, got {config.resume!r}"
        )
    metric = config.metric_for_best
    if not isinstance(metric, str) or not metric or re.search(r"@0+$", metric):
        raise ValueError(
            f"metric_for_best must be a metric's name, its cut at least 1, got {metric!r}"
        )
    if not config.output:
        raise ValueError("output must name a directory")


def _check_together(config: TrainingConfig) -> None:
    if config.max_steps <= 0 and not config.num_epochs > 0:
        raise ValueError(
            f"num_epochs must be above 0 unless max_steps is set, got {config.num_epochs}"
        )
    if config.streaming and config.max_steps <= 0:
        raise ValueError("max_steps must be set with streaming: a stream's length is not known")
    if config.schedule == "constant" and config.warmup_steps:
        raise ValueError(
            f"schedule must be another one with warmup_steps {config.warmup_steps}, as "
            "constant_with_warmup: constant has no warmup"
        )
    if config.lora_rank and (config.freeze_layers or config.freeze):
        raise ValueError(
            "freeze_layers and freeze must be off with lora_rank: LoRA freezes the encoder itself"
        )
    if config.lora_rank and config.precision == "bf16-pure":
        raise ValueError(
            "precision must be fp32, bf16 or fp16 with lora_rank: adapters are fp32, got bf16-pure"
        )
    if config.cuda_graphs and (config.torch_compile or config.gradient_checkpointing):
        other = "torch_compile" if config.torch_compile else "gradient_checkpointing"
        raise ValueError(f"{other} must be off with cuda_graphs")


def _check_objective(objective: list[dict[str, Any]] | str, options: dict[str, Any]) -> None:
    several = isinstance(objective, list)
    for one in objective if isinstance(objective, list) else [{"name": objective}]:
        if not isinstance(one, dict) or "name" not in one:
            raise ValueError(
                f"objective must be a name or a list of mappings with a name, got {one!r} in it"
            )
        check_name(one["name"])
    if not objective:
        raise ValueError("objective must name at least one loss, got an empty list")
    if options and (several or objective == "lambda_loss"):
        where = (
            "beside each name in objective" if several else "settings of their own, as scheme and k"
        )
        raise ValueError(
            f"objective_options must be empty here, got {options}: options are {where}"
        )

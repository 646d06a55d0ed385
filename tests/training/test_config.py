from __future__ import annotations

import subprocess
import sys

import pytest

from rerank_fast.training.config import TrainingConfig


def test_the_defaults_are_the_published_recipe():
    config = TrainingConfig()
    assert (config.batch_size, config.num_epochs, config.learning_rate) == (16, 1, 2e-5)
    assert (config.warmup_ratio, config.schedule, config.precision, config.seed) == (
        0.1,
        "linear",
        "auto",
        12,
    )
    assert (config.scheme, config.k, config.sigma, config.mu) == ("ndcg2pp", None, 1.0, 10.0)
    assert (config.weight_decay, config.max_grad_norm, config.mini_batch_size) == (0.0, 1.0, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("max_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", "2e-5"),
        ("max_grad_norm", float("inf")),
        ("max_length", 2),
        ("overwrite", "no"),
        ("num_epochs", 0),
        ("learning_rate", float("nan")),
        ("warmup_ratio", 1.1),
        ("schedule", "reduce_lr_on_plateau"),
        ("weight_decay", -0.1),
        ("precision", "fp8"),
        ("sharding", "fsdp"),
        ("gradient_accumulation_steps", 0),
        ("gradient_cache", "yes"),
        ("skip_below", -1.0),
        ("max_docs_per_list", 1),
        ("early_stopping_patience", 0),
        ("layer_lr_decay", 0.0),
        ("ema_decay", 1.0),
        ("freeze", "embeddings"),
        ("resume", ""),
        ("scheme", "ndcg3"),
        ("reduction", "none"),
        ("metric_for_best", ""),
        ("metric_for_best", "ndcg@0"),
        ("save_total_limit", 0),
        ("output", ""),
        ("k", -1),
        ("k", 2**70),
        ("k", "3"),
        ("k", True),
        ("batch_size", 2**70),
        ("learning_rate", 10**400),
        ("sigma", 0.0),
        ("sigma", 1e-50),
        ("eps", -1e-10),
        ("mu", -1.0),
        ("mu", 1e39),
        ("warmup_steps", -1),
        ("optimizer", "lion"),
        ("optimizer_options", "momentum=0.9"),
        ("schedule_options", []),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", 0.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_that_no_run_can_use_is_named(name: str, value: object):
    with pytest.raises(ValueError, match=rf"^{name} must "):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(("metric", "k"), [("ndcg@10", 10), ("mrr@3", 3), ("map", 10)])
def test_the_named_metric_sets_the_cut_of_the_evaluation(metric: str, k: int):
    config = TrainingConfig(metric_for_best=metric)
    assert config.at_k == k


def test_importing_the_config_and_the_command_line_loads_no_torch():
    code = (
        "import sys, rerank_fast.cli; from rerank_fast.training import TrainingConfig; "
        "TrainingConfig();sys.exit(', '.join({'torch', 'transformers', 'datasets', 'triton'} & "
        "set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_that_do_not_go_together_are_named():
    with pytest.raises(ValueError, match="max_steps must be set with streaming"):
        TrainingConfig(streaming=True)
    with pytest.raises(ValueError, match="freeze_layers and freeze must be off with lora_rank"):
        TrainingConfig(lora_rank=4, freeze_layers=1)
    with pytest.raises(ValueError, match="precision must be fp32, bf16 or fp16 with lora_rank"):
        TrainingConfig(lora_rank=4, precision="bf16-pure")

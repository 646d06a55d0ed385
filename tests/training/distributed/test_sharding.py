"""FSDP2: weights, gradients and optimizer state in parts over two processes, the numbers of one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.training.checkpoints import checkpoints, load_checkpoint
from tests.model.modular_factory import ettin, make_peer
from tests.model_factory import make_tiny_t5
from tests.training.conftest import config_for, log_rows, make_lists, weights
from tests.training.distributed.sharded_run import PAIR
from tests.training.distributed.test_distributed import (
    SETTINGS,
    assert_same_weights,
    flags,
    in_two_processes,
    launch,
    uneven_lists,  # noqa: F401 - a fixture
)

FSDP2 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}
# All that acts on weights beside the loss.
MIXED = {
    "ema_decay": 0.5,
    "layer_lr_decay": 0.8,
    "freeze": ["*.layer.0.output.*"],
    "weight_decay": 0.1,
}


def test_accelerates_fsdp2_gives_the_weights_and_metrics_of_one_process(
    still_bert: Path,
    uneven_lists: Dataset,  # noqa: F811
    tmp_path: Path,
):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    lists, held_out, file = (
        tmp_path / name for name in ("lists.parquet", "eval.parquet", "accelerate.yaml")
    )
    uneven_lists.to_parquet(lists)
    make_lists(11, seed=5).to_parquet(held_out)
    file.write_text(yaml.safe_dump(FSDP2))
    settings = {**SETTINGS, **MIXED, "gradient_accumulation_steps": 2}
    config = config_for(tmp_path / "one", eval_on_start=True, **settings)
    Trainer(still_bert, str(lists), eval=str(held_out), config=config).train()

    arguments = flags(
        still_bert, lists, tmp_path / "two", eval=held_out, logging_steps=1, **settings
    )
    arguments.remove("--precision")  # what Accelerate says is what it is
    arguments.remove("fp32")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    done = launch([*accelerate, "--main_process_port"], 29617, arguments)
    printed, _ = done.communicate(timeout=180)
    assert done.returncode == 0, printed
    assert (
        printed.count(
            "As accelerate launch was told: precision fp32 (mixed_precision no), sharding fsdp2."
        )
        == 1
    )
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))
    for a, b in zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "two"), strict=True):
        for name in a.keys() & {"step", "loss", "gradient_norm", "map", "ndcg@10", "eval_loss"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    # One wrote it, whole, as plain safetensors.
    files = sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
    assert files == ["model.safetensors"]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    pairs = [("what is the panda", "panda rain"), ("what is the panda", "bear sea city")]
    peer = sentence_transformers.CrossEncoder(str(tmp_path / "two"), device="cpu")
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "two", device="cpu").predict(pairs), peer.predict(pairs), atol=1e-6
    )


@pytest.fixture(scope="module")
def deberta(still_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which can't run packed: its own forward is called."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    directory = tmp_path_factory.mktemp("sharded") / "deberta"
    bert = CrossEncoder(still_bert, device="cpu")
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=bert.model.config.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        conv_kernel_size=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1,
    )
    DebertaV2ForSequenceClassification(config).save_pretrained(directory)
    bert.tokenizer.save_pretrained(directory)
    return directory


def test_shards_are_halves_a_killed_run_goes_on_to_the_same_bits_and_other_models_train_too(
    tiny_bert: Path, still_bert: Path, deberta: Path, tmp_path: Path
):
    make_peer(tmp_path / "modules", ettin("mean"))
    modules, t5 = tmp_path / "modules" / "model", make_tiny_t5(tmp_path / "t5")
    lists, held_out = tmp_path / "lists.parquet", tmp_path / "eval.parquet"
    make_lists(48).to_parquet(lists)
    make_lists(9, seed=2).to_parquet(held_out)

    def run(name: str, model: Path, **settings: object) -> dict:
        chosen = {"sharding": "fsdp2", "max_steps": 8, "save_steps": 3, "eval_steps": 4, **settings}
        config = asdict(config_for(tmp_path / name, **chosen))
        return {
            "model": str(model),
            "lists": str(lists),
            "eval_lists": str(held_out),
            "config": config,
        }

    stopped = run("stopped", tiny_bert, ema_decay=0.9)
    done = in_two_processes([{**stopped, "kill_at": 5}], tmp_path, 29619)
    assert done.returncode != 0
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]
    others = {
        "padded": (
            deberta,
            {"gradient_cache": "on", "gradient_accumulation_steps": 2, "mini_batch_size": 5},
        ),
        "pure": (still_bert, {"precision": "bf16-pure"}),
        "fp16": (deberta, {"precision": "fp16"}),
        "lora": (still_bert, {"lora_rank": 4}),
        "modules": (modules, {}),
        "modules, gradients alone": (modules, {"sharding": "none"}),
        "encoder-decoder": (t5, {"gradient_cache": "on"}),
    }
    stopped["config"]["resume"] = "auto"
    runs = [run("unbroken", tiny_bert, ema_decay=0.9), stopped]
    runs += [run(name, model, **settings) for name, (model, settings) in others.items()]
    done = in_two_processes(runs, tmp_path, 29621)
    assert done.returncode == 0, done.stderr

    for place in (".", "checkpoint-6"):
        a, b = weights(tmp_path / "unbroken" / place), weights(tmp_path / "stopped" / place)
        assert all(torch.equal(a[name], b[name]) for name in a), place
    # Whole: another number of them may go on.
    _, tensors = load_checkpoint(tmp_path / "unbroken" / "checkpoint-6")
    model = CrossEncoder(tiny_bert, device="cpu").model
    assert all(
        tensors[f"optimizer.{name}.exp_avg"].shape == one.shape
        for name, one in model.named_parameters()
    )

    parts = [
        json.loads((tmp_path / "unbroken" / f"rank-{rank}.json").read_text()) for rank in range(2)
    ]
    for kind, times in (("weights", 1), ("gradients", 1), ("moments", 2)):
        shares = [part[kind] / (times * part["whole"]) for part in parts]
        assert sum(shares) == 1
        assert max(shares) < 0.51, kind  # a vector of odd length has no halves

    assert parts[0]["score"] == parts[1]["score"]
    # What is left in memory is an ordinary model: it can be saved, and trained again.
    for name in ("unbroken", "stopped", *others):
        in_memory = CrossEncoder(tmp_path / name / "memory", device="cpu")
        best = weights(tmp_path / name)
        assert all(torch.equal(one, best[key]) for key, one in in_memory.model.state_dict().items())
        (checkpoint,) = checkpoints(tmp_path / name / "again")
        for rank in range(2):
            part = json.loads((tmp_path / name / f"rank-{rank}.json").read_text())
            assert part["score"] == pytest.approx(in_memory.predict(PAIR)[0], rel=1e-5), name
            assert part["class"] == type(in_memory.model).__name__
            score = CrossEncoder(checkpoint, device="cpu").predict(PAIR)[0]
            assert part["interrupted_score"] == pytest.approx(score, rel=1e-4), name

    for name, (model_path, settings) in others.items():
        config = config_for(
            tmp_path / f"{name}-alone", max_steps=8, save_steps=3, eval_steps=4, **settings
        )
        Trainer(model_path, str(lists), eval=str(held_out), config=config).train()
        a, b = (log_rows(tmp_path / run) for run in (name, f"{name}-alone"))
        # Narrow sums round with their cut, and where that changes a rank the loss jumps: the first
        # steps are alike.
        exact = name not in ("pure", "fp16")
        for ours, alone in zip(a, b, strict=True):
            tolerance = 1e-4 if exact else 1e-2 if ours["step"] <= 2 else 0.15
            for key in ours.keys() & {"step", "loss", "gradient_norm", "loss_scale", "overflows"}:
                assert ours[key] == pytest.approx(alone[key], rel=tolerance), (name, key)
    # One process goes on from two processes' checkpoint.
    settings = {**others["padded"][1], "max_steps": 8, "save_steps": 3, "eval_steps": 4}
    config = config_for(
        tmp_path / "alone", **settings, resume=str(tmp_path / "padded" / "checkpoint-6")
    )
    Trainer(deberta, str(lists), eval=str(held_out), config=config).train()
    a, b = (log_rows(tmp_path / name)[-1] for name in ("alone", "padded"))
    assert (a["step"], a["map"]) == (b["step"], pytest.approx(b["map"], abs=1e-6))
    places = [path.parent.parent for path in (tmp_path / "lora").rglob("adapter_model.safetensors")]
    # Beside the model, in both of its checkpoints, and in that of the second run.
    assert len(places) == 4

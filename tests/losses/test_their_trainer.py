"""Every loss inside sentence-transformers' trainer: loss curves, mixed precision, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder import losses as peer_losses
from torch import nn
from transformers import TrainerCallback

from rerank_fast import losses
from rerank_fast.model.packed.encoder import PackedPairs
from tests.losses.beside_theirs import BATCHES, CASES, Case
from tests.losses.conftest import STILL


class Curve(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(
    directory: str,
    output: Path,
    make: Callable[[nn.Module], nn.Module],
    takes: str,
    **settings: Any,
) -> list[float]:
    """The losses of ten steps."""
    torch.manual_seed(0)
    model = CrossEncoder(directory, num_labels=1, device="cpu", config_kwargs=STILL)
    columns, labels = BATCHES[takes][0]
    rows = columns if labels is None else {**columns, "labels": labels}
    curve = Curve()
    CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            output_dir=str(output),
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            warmup_steps=1,
            seed=12,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({name: column * 14 for name, column in rows.items()}),
        loss=make(model),
        callbacks=[curve],
    ).train()
    return curve.losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_changing_the_import_keeps_the_loss_curve(case: Case, directory: str, tmp_path: Path):
    theirs = train(directory, tmp_path, case.make_theirs, case.takes)
    ours = train(directory, tmp_path, case.make, case.takes)
    assert len(ours) == 10
    assert len(set(theirs)) == 10  # it moves
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_in_bf16_their_trainer_runs_it_packed(
    cached: bool, directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Accelerate puts an autocast on the model's forward, which packed execution does without."""
    dtypes, call = [], PackedPairs.__call__
    monkeypatch.setattr(
        PackedPairs,
        "__call__",
        lambda step, *rows: (dtypes.append(step.dtype), call(step, *rows))[1],
    )
    theirs = train(directory, tmp_path, peer_losses.LambdaLoss, "lists", bf16=True)
    assert not dtypes

    def ours(model: nn.Module) -> nn.Module:
        return losses.LambdaLoss(model, gradient_cache=cached)

    found = train(directory, tmp_path, ours, "lists", bf16=True)
    assert set(dtypes) == {torch.bfloat16}
    assert found == pytest.approx(theirs, rel=0.02)


_IN_TWO_PROCESSES = """
import gc
import itertools
import sys
import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainingArguments
from rerank_fast.losses import LambdaLoss
from rerank_fast.model.packed.encoder import PackedPairs
from tests.losses.beside_theirs import DOCUMENTS, LABELS, QUERIES
from tests.losses.conftest import STILL

calls, call = [], PackedPairs.__call__
PackedPairs.__call__ = lambda step, *rows: (calls.append(1), call(step, *rows))[1]
dataset = Dataset.from_dict({"query": QUERIES * 4, "docs": DOCUMENTS * 4, "labels": LABELS * 4})
weights = []
for packed, cached in itertools.product((False, True), repeat=2):
    torch.manual_seed(0)
    model = CrossEncoder(sys.argv[1], num_labels=1, device="cpu", config_kwargs=STILL)
    arguments = CrossEncoderTrainingArguments(
        output_dir=sys.argv[2], max_steps=3, per_device_train_batch_size=2, learning_rate=0.1,
        use_cpu=True, optim="sgd", ddp_backend="gloo", save_strategy="no", report_to=[],
        disable_tqdm=True, gradient_accumulation_steps=2,
    )
    loss = LambdaLoss(model, mini_batch_size=2, packed=packed, gradient_cache=cached)
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss).train()
    assert type(loss.model).__name__ == "DistributedDataParallel"
    assert "forward" not in vars(model)
    assert bool(calls) == packed
    weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
untrained = CrossEncoder(sys.argv[1], device="cpu")
start = torch.cat([w.detach().flatten() for w in untrained.parameters()])
for found in weights[1:]:
    torch.testing.assert_close(found, weights[0], rtol=1e-5, atol=1e-6)
    assert (found - start).abs().max() > 1e-3
    others = [torch.empty_like(found) for _ in range(2)]
    torch.distributed.all_gather(others, found)
    assert torch.equal(*others)
# Its threads would abort a process that exits before they are done; DDP's wrapper keeps them.
del model, loss
gc.collect()
torch.distributed.destroy_process_group()
"""


def test_their_trainer_in_two_processes_runs_it_packed(directory: str, tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(_IN_TWO_PROCESSES)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [*command, str(script), directory, str(tmp_path / "output")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]

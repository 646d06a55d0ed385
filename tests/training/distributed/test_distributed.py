"""The loss of a global batch does not depend on how it is cut: accumulation steps, processes,
evaluation.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from rerank_fast import CrossEncoder, Trainer
from rerank_fast.training.checkpoints import checkpoints
from rerank_fast.training.distributed import collectives
from rerank_fast.training.distributed.collectives import ShardedScorer
from tests.training.conftest import config_for, log_rows, make_lists, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
]
ACCELERATE += [
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
]
SETTINGS = {
    "batch_size": 32,
    "max_steps": 20,
    "eval_steps": 10,
    "learning_rate": 2e-5,
    "max_grad_norm": 0.5,
}


@pytest.fixture(scope="module")
def uneven_lists() -> Dataset:
    """Ragged lists, some without a preference pair, some with many: shares of unequal pair counts.

    No two documents of a list are alike: a tie would be broken by rounding, and the loss jumps with
    the ranks.
    """
    draw = np.random.default_rng(3)
    words = ["weather", "rain", "sea", "museum", "city", "panda", "bear", "fish", "sun", "wind"]
    rows = []
    for i in range(70):
        size = 24 if i % 9 == 0 else int(draw.integers(2, 7))
        docs = {" ".join(draw.choice(words, int(draw.integers(1, 12)))) for _ in range(size)}
        labels = (
            [1.0] * len(docs)
            if i % 7 == 0
            else draw.integers(0, 3, len(docs)).astype(float).tolist()
        )
        rows.append({"query": "what is the panda", "docs": sorted(docs), "labels": labels})
    return Dataset.from_list(rows)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(launcher: list[str], port: int, arguments: list[str]) -> subprocess.Popen:
    command = [*launcher, str(port), "-m", "rerank_fast", "train", *arguments]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def in_two_processes(
    runs: list[dict],
    directory: Path,
    port: int,
    *,
    program: str = "sharded_run",
    arguments: list[Path] | None = None,
) -> subprocess.CompletedProcess:
    """A program beside this one, by default with the runs in a file."""
    if arguments is None:
        arguments = [directory / "runs.json"]
        arguments[0].write_text(json.dumps(runs))
    command = [*TORCHRUN, str(port), "-m", f"tests.training.distributed.{program}"]
    command += map(str, arguments)
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=180
    )


def flags(model: Path, lists: Path, output: Path, **settings: object) -> list[str]:
    chosen = {
        "model": model,
        "train": lists,
        "output": output,
        "precision": "fp32",
        "show_progress_bar": "false",
    }
    return [
        part for name, value in {**chosen, **settings}.items() for part in (f"--{name}", str(value))
    ]


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        # Neither a loss of differences nor a softmax depends on these biases: their gradient is
        # rounding, and Adam makes steps of it.
        no_gradient = name.endswith(("classifier.bias", "key.bias"))
        limit = SETTINGS["max_steps"] * SETTINGS["learning_rate"] if no_gradient else 1e-5
        assert (a[name] - b[name]).abs().max() <= limit, name


@pytest.mark.parametrize(
    "cut", [{"scheme": "ndcg2pp"}, {"k": 2}, {"reduction": "lists"}, {"scheme": "ndcg1"}]
)
def test_accumulation_gives_the_weights_of_one_step(
    cut: dict, still_bert: Path, uneven_lists: Dataset, tmp_path: Path
):
    before = weights(still_bert)
    for name, parts in {"whole": 1, "cut": 4}.items():
        settings = {**SETTINGS, **cut, "gradient_accumulation_steps": parts}
        Trainer(still_bert, uneven_lists, config=config_for(tmp_path / name, **settings)).train()
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert_same_weights(whole, parts)
    assert max((whole[name] - before[name]).abs().max() for name in whole) > 1e-4
    losses = [[row["loss"] for row in log_rows(tmp_path / name)] for name in ("whole", "cut")]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-6)


def test_two_processes_give_the_weights_and_metrics_of_one(
    still_bert: Path, uneven_lists: Dataset, tmp_path: Path
):
    lists, held_out = tmp_path / "lists.parquet", tmp_path / "eval.parquet"
    uneven_lists.to_parquet(lists)
    make_lists(11, seed=5).to_parquet(held_out)
    config = config_for(tmp_path / "one", eval_on_start=True, **SETTINGS)
    Trainer(still_bert, str(lists), eval=str(held_out), config=config).train()
    arguments = flags(
        still_bert, lists, tmp_path / "two", eval=held_out, logging_steps=1, **SETTINGS
    )
    done = launch(TORCHRUN, 29611, arguments)
    printed, _ = done.communicate(timeout=180)
    assert done.returncode == 0, printed
    assert printed.count("20 steps") == 1  # one of them speaks
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"))
    one, two = log_rows(tmp_path / "one"), log_rows(tmp_path / "two")
    assert len(one) == len(two)  # and one writes
    for a, b in zip(one, two, strict=True):
        for name in a.keys() & {"step", "loss", "gradient_norm", "map", "ndcg@10", "eval_loss"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


def test_a_process_that_dies_ends_the_run(still_bert: Path, uneven_lists: Dataset, tmp_path: Path):
    lists = tmp_path / "lists.parquet"
    uneven_lists.to_parquet(lists)
    arguments = flags(
        still_bert, lists, tmp_path / "run", max_steps=10**6, logging_steps=1, save_steps=20
    )
    run = launch(ACCELERATE, 29613, arguments)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint-20").exists():
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        victim = next(
            pid for pid in descendants(run.pid) if b"LOCAL_RANK=1\0" in environment_of(pid)
        )
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        run.communicate(timeout=60)
        assert time.monotonic() - killed < 60
        assert run.returncode != 0
        assert (
            json.loads((tmp_path / "run" / "checkpoint-20" / "trainer_state.json").read_text())[
                "step"
            ]
            == 20
        )
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def test_sigterm_to_the_launcher_leaves_a_checkpoint_and_it_goes_on_to_the_same_bits(
    tiny_bert: Path, tmp_path: Path
):
    lists, held_out = tmp_path / "lists.parquet", tmp_path / "eval.parquet"
    make_lists(48).to_parquet(lists)
    make_lists(7, seed=4).to_parquet(held_out)

    def run(name: str, **settings: object) -> dict:
        chosen = {
            "max_steps": 16,
            "save_steps": 99,
            "eval_steps": 12,
            "gradient_accumulation_steps": 2,
        }
        config = asdict(config_for(tmp_path / name, ema_decay=0.9, **chosen, **settings))
        return {
            "model": str(tiny_bert),
            "lists": str(lists),
            "eval_lists": str(held_out),
            "config": config,
        }

    done = in_two_processes([{**run("stopped"), "terminate_at": 3}], tmp_path, 29623)
    # Torchrun's own; what has not ended in 30 seconds it kills.
    assert done.returncode == 1, done.stderr
    (checkpoint,) = checkpoints(tmp_path / "stopped")
    step = int(checkpoint.name.partition("-")[2])
    assert 3 <= step < 16, done.stderr
    assert done.stderr.count(f"Stopped by a signal at step {step} of 16") == 1
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    done = in_two_processes([run("unbroken"), run("stopped", resume="auto")], tmp_path, 29625)
    assert done.returncode == 0, done.stderr
    unbroken, stopped = weights(tmp_path / "unbroken"), weights(tmp_path / "stopped")
    assert all(torch.equal(unbroken[name], stopped[name]) for name in unbroken)


def descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_the_scores_of_several_processes_are_those_of_one(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
):
    model = CrossEncoder(tiny_bert, device="cpu")
    pairs = [("what is the panda", doc) for row in make_lists(5) for doc in row["docs"]]
    expected = model.predict(pairs)
    shares: list[torch.Tensor] = []

    class State:
        num_processes = 3

    monkeypatch.setattr(
        "rerank_fast.training.distributed.collectives.sum_over_processes",
        lambda t: shares.append(t[0].clone()),
    )
    for rank in range(3):
        state = State()
        state.process_index = rank
        ShardedScorer(model, state).score_tokens(model.tokenize(pairs))
    counts = sum((share != 0).int() for share in shares)
    assert counts.tolist() == [1] * len(pairs)  # each pair by exactly one
    np.testing.assert_allclose(model.activation_fn(sum(shares)).numpy(), expected, atol=1e-6)


def test_messages_are_summed_while_the_next_is_copied_in(monkeypatch: pytest.MonkeyPatch):
    """Of any dtypes and shapes, transposed too; two are on their way at most."""
    under_way: list[int] = []
    sizes: list[int] = []

    class Work:
        def __init__(self, flat: torch.Tensor) -> None:
            self.flat = flat

        def wait(self) -> None:
            self.flat.mul_(2)  # two processes with the same
            under_way.pop()

    def all_reduce(flat: torch.Tensor, *, async_op: bool) -> Work:
        assert async_op
        under_way.append(flat.numel())
        sizes.append(flat.numel())
        assert len(under_way) <= 2
        return Work(flat)

    monkeypatch.setattr(collectives, "several", lambda: True)
    monkeypatch.setattr(collectives, "_MESSAGE", 20)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    shapes = [(3, 5), (), (40,), (2, 2), (0,), (4, 3)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors += [torch.randn(6, 4).t(), torch.randn(5).bfloat16(), torch.randn(2, 3).double()]
    expected = [2 * one for one in tensors]
    collectives.sum_over_processes(tensors)
    assert not under_way
    assert sizes == [32, 48, 32, 32, 16, 16]  # each tensor begins at a multiple of 16
    assert all(torch.equal(one, two) for one, two in zip(tensors, expected, strict=True))


def test_a_flag_is_that_of_the_step_before():
    flag, value = collectives.LateFlag(), torch.zeros(())
    assert not flag.get()
    for step in range(4):
        value.fill_(step // 2)
        flag.put(value)
        value.fill_(1 - step // 2)  # the device goes on with it
        assert flag.get() == (step >= 2)

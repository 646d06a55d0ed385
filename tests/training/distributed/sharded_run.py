"""Runs one after the other in each of several processes: torchrun -m ...sharded_run RUNS.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rerank_fast import Trainer, TrainingConfig
from rerank_fast.training.events import Event, TrainingInterrupted

PAIR = [("what is the panda", "panda rain")]


def main(runs: list[dict]) -> None:
    for run in runs:
        one_run(**run)
    # its threads would abort a process that exits before they are done
    torch.distributed.destroy_process_group()


def one_run(
    model: str,
    lists: str,
    eval_lists: str | None,
    config: dict,
    kill_at: int = 0,
    terminate_at: int = 0,
) -> None:
    """Each process kills itself after the step kill_at.

    At terminate_at the first one sends SIGTERM to the launcher; from there on steps are slow, and
    few follow until it comes back.
    """
    seen: dict = {}

    def note(event) -> None:
        trainer = event.trainer
        if event.name == "step_end" and event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if event.name == "step_end" and 0 < terminate_at <= event.step:
            if event.step == terminate_at and trainer.processes.is_main_process:
                os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)
        if event.name == "step_end" and event.step == 1:
            seen["whole"] = sum(one.numel() for one in trainer.model.model.parameters())
            seen["weights"] = sum(local(one).numel() for one in trainer.model.model.parameters())
            state = trainer.optimizer.state.values()
            seen["moments"] = sum(
                local(one[key]).numel() for one in state for key in ("exp_avg", "exp_avg_sq")
            )

    trainer = Trainer(
        model, lists, eval=eval_lists, config=TrainingConfig(**config), callbacks=[note]
    )

    def before_step(optimizer, *arguments) -> None:
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"]]
        seen.setdefault("gradients", sum(local(one).numel() for one in gradients))

    trainer.optimizer.register_step_pre_hook(before_step)
    trainer.train()
    # An ordinary model again when all is done.
    output, rank = Path(config["output"]), trainer.processes.process_index
    if rank == 0:
        trainer.model.save_pretrained(output / "memory")
    seen["score"] = float(trainer.model.predict(PAIR)[0])
    seen["class"] = type(trainer.model.model).__name__
    # It can be trained again, also in parts, and is one too when that is interrupted.
    again = {"output": str(output / "again"), "resume": "never", "ema_decay": 0.0, "max_steps": 4}
    try:
        Trainer(
            trainer.model,
            lists,
            config=TrainingConfig(**{**config, **again}),
            callbacks=[interrupt],
        ).train()
    except TrainingInterrupted:
        seen["interrupted_score"] = float(trainer.model.predict(PAIR)[0])
    (output / f"rank-{rank}.json").write_text(json.dumps(seen))


def interrupt(event: Event) -> None:
    if event.name == "step_end" and event.step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def local(tensor: Any) -> torch.Tensor:
    """This process's part of a shard; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

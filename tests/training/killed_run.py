"""A run that kills itself: python -m tests.training.killed_run SETTINGS.json, in a process of its
own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from safetensors.torch import save_file

from rerank_fast import Trainer, TrainingConfig
from rerank_fast.training import checkpoints


def main(settings: dict) -> None:
    kill_at, inside_save = settings.pop("kill_at"), settings.pop("inside_save")
    sent = getattr(signal, settings.pop("signal", "SIGKILL"))
    model, lists, held_out = (settings.pop(name) for name in ("model", "lists", "eval_lists"))

    def on_event(event) -> None:
        if event.name == "step_end" and event.step == kill_at and not inside_save:
            os.kill(os.getpid(), sent)

    def half_a_file(tensors, file) -> None:
        if (
            Path(file).parent.name.startswith(".checkpoint-")
            and progress["step"] == kill_at
            and inside_save
        ):
            save_file(tensors, file)
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, file)

    progress = {"step": 0}

    def note(event) -> None:
        progress["step"] = event.step

    checkpoints.save_file = half_a_file
    config = TrainingConfig(**settings)
    Trainer(model, lists, eval=held_out, config=config, callbacks=[note, on_event]).train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""The output directory of a run: refused early, written whole, pruned."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.storage import holds_model

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Make the directory and make sure that a model can be written to it.

    Raises:
        ValueError: it holds a model or checkpoints and overwrite is False, or it can't be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output {directory} is a file; expected a directory")
    if directory.is_dir() and (holds_model(directory) or checkpoints(directory)) and not overwrite:
        raise ValueError(
            f"output {directory} already holds a model; pass overwrite=True (--overwrite) to replace it"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"output {directory} can't be written: {error}") from error


def clear_output(directory: Path) -> None:
    """Remove what an earlier run left beside its model: two runs' checkpoints and logs never mix."""
    for old in checkpoints(directory):
        shutil.rmtree(old)
    for name in ("train_log.jsonl", "metrics.json"):
        (directory / name).unlink(missing_ok=True)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a run's directory, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def save_checkpoint(model: CrossEncoder, directory: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write a loadable checkpoint-N, renamed into place when whole; only the newest `keep` stay."""
    target = directory / f"checkpoint-{step}"
    staging = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=directory))
    try:
        model.save_pretrained(staging)
        write_json(staging / "trainer_state.json", {"step": step, **state})
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half."""
    staging = file.with_name(f".{file.name}.new")
    staging.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, file)

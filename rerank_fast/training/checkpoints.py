"""The output directory of a run: refused early, checkpoints written whole, found again, pruned."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rerank_fast.model.storage import holds_model
from rerank_fast.training.run_log import LOG_FILE

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE, _TENSORS = "trainer_state.json", "trainer_state.safetensors"
NON_FINITE_FILE = "non_finite_loss.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier ones are as they were."""


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
            + (", or resume='auto' (--resume auto) to go on from its checkpoint" if checkpoints(directory) else "")
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"output {directory} can't be written: {error}") from error


def clear_output(directory: Path, *, beyond: int = 0) -> None:
    """Remove what an earlier run left beside its model: two runs' checkpoints and logs never mix.

    With `beyond`, keep what belongs to the steps up to there: the run goes on from it.
    """
    for old in checkpoints(directory):
        if _step(old) > beyond:
            shutil.rmtree(old)
    for name in ("metrics.json", NON_FINITE_FILE, *([] if beyond else [LOG_FILE])):
        (directory / name).unlink(missing_ok=True)
    # What a save that was killed left behind.
    for pattern in (".checkpoint-*", ".saving-*", ".old-*"):
        for left in directory.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints in a run's directory, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if (path / _STATE).is_file()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def find_checkpoint(directory: Path, resume: str) -> Path | None:
    """What a run goes on from: resume is "never", "auto" (the newest in the directory) or a checkpoint's path.

    Raises:
        ValueError: the path is no checkpoint of this package.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(checkpoints(directory)), None)
    if not (Path(resume) / _STATE).is_file() or not (Path(resume) / _TENSORS).is_file():
        raise ValueError(f"resume: {resume} is no checkpoint: expected a directory with {_STATE} and {_TENSORS}")
    return Path(resume)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values and tensors of a run's state.

    Raises:
        ValueError: a file is damaged.
    """
    try:
        values = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        return values, load_file(checkpoint / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {checkpoint} can't be read: {error}") from error


def save_checkpoint(
    target: Path,
    save_model: Callable[[Path], None],
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Write a loadable checkpoint-N: to a directory beside, flushed to the disk, then renamed.

    A kill at any moment leaves the earlier ones whole. Only the newest `keep` stay.

    Raises:
        CheckpointError: it can't be written, as on a full disk.
    """
    directory, staging = target.parent, None
    try:
        staging = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=directory))
        save_model(staging)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / _TENSORS)
        (staging / _STATE).write_text(json.dumps({"step": _step(target), **values}) + "\n", encoding="utf-8")
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        if target.exists():
            os.replace(target, directory / f".old-{target.name}")
        os.replace(staging, target)
        _flush(directory)
    except (OSError, SafetensorError, ValueError) as error:
        left = [path.name for path in checkpoints(directory)]
        hint = f"{left[-1]} is whole: go on from it with --resume auto" if left else "there is no earlier one"
        raise CheckpointError(f"can't write {target}: {error}; {hint}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(directory / f".old-{target.name}", ignore_errors=True)
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def save_best(directory: Path, save_model: Callable[[Path], None]) -> None:
    """Write the best model so far.

    Raises:
        CheckpointError: it can't be written, as on a full disk.
    """
    try:
        save_model(directory)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"can't write the best model to {directory}: {error}; checkpoints there are whole"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note_non_finite(directory: Path, step: int, loss: float, lists: Sequence[int]) -> Path:
    """Write which lists gave a loss that is not finite."""
    file = directory / NON_FINITE_FILE
    write_json(file, {"step": step, "loss": str(loss), "lists": list(lists)})
    return file


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half."""
    staging = file.with_name(f".{file.name}.new")
    staging.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, file)

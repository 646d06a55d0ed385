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
METRICS_FILE, NON_FINITE_FILE = "metrics.json", "non_finite_loss.json"
UNFINISHED_FILE = "unfinished_run.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier ones are as they were."""


def open_output(directory: Path, *, resume: str, overwrite: bool) -> Path | None:
    """Make the directory and make sure that a model can be written to it.

    Args:
        directory: of the run.
        resume: "never"; "auto" goes on from the newest checkpoint in the directory, and begins anew where a run was
            killed before its first one; or a checkpoint's path.
        overwrite: replace a model that the directory already holds.

    Returns:
        The checkpoint to go on from, None for a fresh start.

    Raises:
        ValueError: it holds a model or checkpoints that may not be replaced, it can't be written, or the path is no
            checkpoint of this package.
    """
    checkpoint = _find_checkpoint(directory, resume)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output {directory} is a file; expected a directory")
    goes_on = is_of(checkpoint, directory) or (resume == "auto" and is_unfinished(directory))
    if directory.is_dir() and (holds_model(directory) or checkpoints(directory)) and not (overwrite or goes_on):
        message = f"output {directory} already holds a model; pass overwrite=True (--overwrite) to replace it"
        if checkpoints(directory):
            message += ", or resume='auto' (--resume auto) to go on from its checkpoint"
        elif is_unfinished(directory):
            message += ", or resume='auto' (--resume auto) to begin its unfinished run anew"
        raise ValueError(message)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"output {directory} can't be written: {error}") from error
    return checkpoint


def is_of(checkpoint: Path | None, directory: Path) -> bool:
    """Whether there is a checkpoint and it is one of the directory's own."""
    return checkpoint is not None and checkpoint.parent.resolve() == directory.resolve()


def mark_unfinished(directory: Path, *, best_step: int) -> None:
    """Note that a run has begun here, and of which step the model beside is; 0 where it is none of the run's."""
    write_json(directory / UNFINISHED_FILE, {"best_step": best_step})


def mark_finished(directory: Path) -> None:
    (directory / UNFINISHED_FILE).unlink(missing_ok=True)


def is_unfinished(directory: Path) -> bool:
    """Whether a run has begun here and not come to its end."""
    return (directory / UNFINISHED_FILE).is_file()


def saved_best_step(directory: Path) -> int:
    """Of which step of the directory's run its model is; 0 where that is not known."""
    file = directory / (UNFINISHED_FILE if is_unfinished(directory) else METRICS_FILE)
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def clear_output(directory: Path, *, beyond: int = 0) -> None:
    """Remove what an earlier run left beside its model: two runs' checkpoints and logs never mix.

    With `beyond`, keep what belongs to the steps up to there: the run goes on from it.
    """
    for old in checkpoints(directory):
        if _step(old) > beyond:
            shutil.rmtree(old)
    for name in (METRICS_FILE, NON_FINITE_FILE, *([] if beyond else [LOG_FILE])):
        (directory / name).unlink(missing_ok=True)
    if not beyond:  # of another model than the one that will be here
        shutil.rmtree(directory / "adapter", ignore_errors=True)
        for old in (directory / "onnx").glob("*.onnx"):
            old.unlink()
    # What a save that was killed left behind.
    for pattern in (".checkpoint-*", ".saving-*", ".old-*"):
        for left in directory.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    for left in directory.glob(".*.json.new"):
        left.unlink()


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints in a run's directory, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if (path / _STATE).is_file()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _find_checkpoint(directory: Path, resume: str) -> Path | None:
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
    values = load_values(checkpoint)
    try:
        return values, load_file(checkpoint / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {checkpoint} can't be read: {error}") from error


def load_values(checkpoint: Path) -> dict[str, Any]:
    """What load_checkpoint gives, without the tensors.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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


def save_best(directory: Path, save_model: Callable[[Path], None], step: int) -> None:
    """Write the best model so far, of this step. After a kill inside, the model there counts as no step's.

    Raises:
        CheckpointError: it can't be written, as on a full disk.
    """
    try:
        mark_unfinished(directory, best_step=0)
        save_model(directory)
        mark_unfinished(directory, best_step=step)
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


def note_non_finite(directory: Path, step: int, loss: float, gradient_norm: float, lists: Sequence[int]) -> Path:
    """Write which lists gave a loss or a gradient that is not finite."""
    file = directory / NON_FINITE_FILE
    numbers = {"loss": str(loss), "gradient_norm": str(gradient_norm)}  # JSON has no NaN
    write_json(file, {"step": step, **numbers, "lists": list(lists)})
    return file


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half."""
    staging = file.with_name(f".{file.name}.new")
    staging.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, file)

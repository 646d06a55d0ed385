"""The output directory of a run: refused early, checkpoints written whole, found again, pruned."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rerank_fast.data.output_errors import writing
from rerank_fast.data.output_lock import locked
from rerank_fast.data.writable import check_directory
from rerank_fast.model.storage import holds_model
from rerank_fast.training.checksums import verify_checksums, write_checksums
from rerank_fast.training.run_log import LOG_FILE

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE, TENSORS_FILE = "trainer_state.json", "trainer_state.safetensors"
METRICS_FILE, NON_FINITE_FILE = "metrics.json", "non_finite_loss.json"
UNFINISHED_FILE = "unfinished_run.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier ones are as they were."""


def check_output(
    directory: Path,
    *,
    resume: str,
    overwrite: bool,
    say: Callable[[str], object] = lambda line: None,
) -> Path | None:
    """Make sure that a model can be written to the directory; nothing is made or changed yet.

    Args:
        directory: of the run.
        resume: "never"; "auto" goes on from the newest whole checkpoint in the directory, and
            begins anew where a run was killed before its first one; or a checkpoint's path.
        overwrite: replace a model that the directory already holds.
        say: is told which checkpoints are damaged where "auto" takes an older one.

    Returns:
        The checkpoint to go on from, None for a fresh start.

    Raises:
        ValueError: it holds a model or checkpoints that may not be replaced, it can't be written,
            the path is no checkpoint of this package, or the checkpoint is damaged, with "auto" all
            that there are.
    """
    checkpoint = _find_checkpoint(directory, resume, say)
    check_replaceable(directory, checkpoint, resume=resume, overwrite=overwrite)
    check_directory(directory, "output")
    return checkpoint


def check_replaceable(
    directory: Path, checkpoint: Path | None, *, resume: str, overwrite: bool
) -> None:
    """Make sure that a run may write over what the directory holds; see check_output."""
    goes_on = is_of(checkpoint, directory) or (resume == "auto" and is_unfinished(directory))
    model, earlier = holds_model(directory), checkpoints(directory)
    if overwrite or goes_on or not (model or earlier):
        return
    weights = any(directory.glob("*.safetensors")) or (directory / "config.json").exists()
    held = "a model" if weights else "the checkpoints of a run" if earlier else "a README.md"
    message = (
        f"output {directory} already holds {held}; pass overwrite=True (--overwrite) to replace "
        f"{'them' if earlier and not weights else 'it'}"
    )
    if earlier:
        message += ", or resume='auto' (--resume auto) to go on from its checkpoint"
    elif is_unfinished(directory):
        message += ", or resume='auto' (--resume auto) to begin its unfinished run anew"
    raise ValueError(message)


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[None]:
    """Make a run's directory and keep it to this process; see locked."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {directory} can't be made: {error}") from error
    with locked(directory):
        yield


def is_of(checkpoint: Path | None, directory: Path) -> bool:
    """Whether there is a checkpoint and it is one of the directory's own."""
    return checkpoint is not None and checkpoint.parent.resolve() == directory.resolve()


def mark_unfinished(directory: Path, *, best_step: int) -> None:
    """Note that a run has begun here, and of which step the model beside is; 0 where it is none of
    the run's.
    """
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
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _find_checkpoint(directory: Path, resume: str, say: Callable[[str], object]) -> Path | None:
    if resume == "never":
        return None
    if resume != "auto":
        if not (Path(resume) / STATE_FILE).is_file():
            raise ValueError(
                f"resume: {resume} is no checkpoint: expected a directory with {STATE_FILE} and "
                f"{TENSORS_FILE}"
            )
        verify_checksums(Path(resume))
        return Path(resume)
    damaged = []
    for checkpoint in reversed(checkpoints(directory)):
        try:
            verify_checksums(checkpoint)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            say(f"{'; '.join(damaged)}: going on from {checkpoint}, which is whole.")
        return checkpoint
    if damaged:
        raise ValueError(f"no checkpoint in {directory} is whole: {'; '.join(damaged)}")
    return None


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the JSON file of a run's state holds, and its tensors.

    Raises:
        ValueError: a file is damaged.
    """
    verify_checksums(checkpoint)
    values = load_values(checkpoint)
    try:
        return values, load_file(checkpoint / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {checkpoint}, {TENSORS_FILE} can't be read: {error}"
        ) from error


def load_values(checkpoint: Path) -> dict[str, Any]:
    """What load_checkpoint gives, without the tensors.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint}, {STATE_FILE} can't be read: {error}") from error


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
    directory = target.parent
    staging = directory / f".{target.name}"  # the run has the directory to itself
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save_model(staging)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, staging / TENSORS_FILE
        )
        state = staging / STATE_FILE
        state.write_text(json.dumps({"step": _step(target), **values}) + "\n", encoding="utf-8")
        # safetensors has made it the owner's alone.
        (staging / TENSORS_FILE).chmod(state.stat().st_mode)
        write_checksums(staging)
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        if target.exists():
            os.replace(target, directory / f".old-{target.name}")
        os.replace(staging, target)
        _flush(directory)
    except (OSError, SafetensorError, ValueError) as error:
        left = [path.name for path in checkpoints(directory)]
        hint = (
            f"{left[-1]} is whole: go on from it with --resume auto"
            if left
            else "there is no earlier one"
        )
        raise CheckpointError(f"can't write {target}: {error}; {hint}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(directory / f".old-{target.name}", ignore_errors=True)
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return target


def save_best(directory: Path, save_model: Callable[[Path], None], step: int) -> None:
    """Write the best model so far, of this step. After a kill inside, the model there counts as no
    step's.

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


def note_non_finite(
    directory: Path, step: int, loss: float, gradient_norm: float, lists: Sequence[int]
) -> Path:
    """Write which lists gave a loss or a gradient that is not finite."""
    file = directory / NON_FINITE_FILE
    numbers = {"loss": str(loss), "gradient_norm": str(gradient_norm)}  # JSON has no NaN
    write_json(file, {"step": step, **numbers, "lists": list(lists)})
    return file


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half.

    Raises:
        ValueError: it can't be written; names it.
    """
    staging = file.with_name(f".{file.name}.new")
    with writing(file):
        staging.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(staging, file)

"""One process at a time writes to an output; the next one is told who does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rerank_fast.data.output_errors import writing


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep an output to this process.

    The system lets go of a lock when its process ends, however it ends: what a killed one leaves
    are files, which stand in nobody's way.

    Args:
        output: a directory that is there, or a file, there or not, in a directory that is.

    Raises:
        ValueError: another process writes to it, or this one does already; names the process and
            since when. Or no lock can be made there.
    """
    file = output / ".lock" if output.is_dir() else output.with_name(f".{output.name}.lock")
    note = file.with_name(f"{file.name}.json")  # of its own: who asks for a lock may empty it
    lock = FileLock(file, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"output {output} is being written by {_holder(note)}: wait for its end or name "
            "another output"
        ) from error
    except OSError as error:
        raise ValueError(f"output {output} can't be written: {error}") from error
    try:
        since = datetime.now().isoformat(sep=" ", timespec="seconds")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        with writing(output):
            note.write_text(json.dumps(holder), encoding="utf-8")
        yield
    finally:
        for left in (note, file):
            with contextlib.suppress(OSError):
                left.unlink()  # while it is held: who has opened it too finds that it is gone
        lock.release()


def _holder(note: Path) -> str:
    try:
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has the lock and has not written yet
        return "another process"

"""Whether an output can be written, asked before the work that would fill it; nothing is made."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_directory(directory: Path, name: str) -> None:
    """Make sure that a directory can be made where it is missing, and written to.

    Raises:
        ValueError: it can't; begins with the name of the argument that it came in.
    """
    try:
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file; expected a directory")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{name} {directory} can't be written: {error}") from error


def check_file(file: Path, name: str) -> None:
    """Make sure that a file can be written, in a directory that is there; its content is left.

    Raises:
        ValueError: it can't; begins with the name of the argument that it came in.
    """
    try:
        if not file.parent.is_dir():
            raise NotADirectoryError(f"directory {file.parent} does not exist")
        if file.exists():
            file.open("ab").close()
        else:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
    except OSError as error:
        raise ValueError(f"{name} {file} can't be written: {error}") from error

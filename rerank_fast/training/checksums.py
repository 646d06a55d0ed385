"""Checksums of a checkpoint's files: a run goes on from what was written, or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

CHECKSUMS_FILE = "checksums.json"


def write_checksums(directory: Path) -> None:
    """Note the SHA-256 of every file in a directory, and of those below it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {path.relative_to(directory).as_posix(): _sha256(path) for path in files}
    sums.pop(CHECKSUMS_FILE, None)  # of an earlier call
    (directory / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def verify_checksums(directory: Path) -> None:
    """Compare every file that was noted; what was put beside them later counts for nothing.

    Raises:
        ValueError: a file is missing, can't be read or is not as it was written; names it.
    """
    file = directory / CHECKSUMS_FILE
    try:
        sums = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    if not isinstance(sums, dict) or not sums:
        raise ValueError(f"{file}: expected files and their checksums, got {sums!r:.60}")
    for name, expected in sums.items():
        try:
            found = _sha256(directory / name)
        except OSError as error:
            raise ValueError(f"{directory / name} can't be read: {error}") from error
        if found != expected:
            raise ValueError(
                f"{directory / name} is damaged: expected SHA-256 {str(expected)[:16]}..., got "
                f"{found[:16]}..."
            )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while part := handle.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()

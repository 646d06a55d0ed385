"""A failed write gets its file's name, which the system does not say of a full disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike

from rerank_fast.model.texts import one_line


@contextlib.contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """Inside, an output is written.

    Raises:
        ValueError: it can't be; names it and says why.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"can't write {path}: {error.strerror or one_line(error)}") from error

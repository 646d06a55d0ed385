"""A checkpoint's files, in a directory or in the hub's cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

SENTENCE_TRANSFORMERS_CONFIG = "config_sentence_transformers.json"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load report: what matters of it is said in our own words."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def read_json(path_or_hub_id: str, name: str, revision: str | None, token: str | bool | None) -> Any:
    """A file of a checkpoint; None where there is none."""
    file = optional_file(path_or_hub_id, name, revision, token)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def optional_file(path_or_hub_id: str, name: str, revision: str | None, token: str | bool | None) -> str | None:
    """Where a file of the checkpoint is; None if it has none."""
    file: str | None = cached_file(
        path_or_hub_id,
        name,
        revision=revision,
        token=token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return file

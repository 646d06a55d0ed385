"""A checkpoint's files, in a directory or in the hub's cache, checked before they are used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rerank_fast.model.texts import one_line, shown

SENTENCE_TRANSFORMERS_CONFIG = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, or a model on the hub whose files are downloaded as they are asked for."""

    name: str  # the directory's path, or the hub id
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @property
    def hub(self) -> dict[str, Any]:
        """Where transformers finds its files, as options of from_pretrained."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }

    @property
    def is_local(self) -> bool:
        return Path(self.name).exists()

    @property
    def may_be_on_hub(self) -> bool:
        """Whether its name is such as the hub gives."""
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            return False
        return True

    def file(self, name: str) -> Path | None:
        """Where a file of the checkpoint is; None if it has none."""
        file: str | None = cached_file(
            self.name,
            name,
            **self.hub,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return None if file is None else Path(file)

    def read_json(self, name: str, kind: type[dict] | type[list] = dict) -> Any:
        """A JSON file of the checkpoint; None where there is none.

        Raises:
            ValueError: it is no JSON of this kind, dict or list; names the file.
        """
        file = self.file(name)
        if file is None:
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {one_line(error)}") from error
        if not isinstance(content, kind):
            expected = "object" if kind is dict else "array"
            raise ValueError(f"{file}: expected a JSON {expected}, got {shown(content)}")
        return content

    def inside(self, name: Any, where: str) -> str:
        """A file's name that another file of the checkpoint gives, if it stays in the checkpoint.

        Raises:
            ValueError: it is no text, or a path that leads elsewhere. `where` has it.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.name}/{where}: expected a file's name, got {shown(name)}")
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{self.name}/{where} leads out of the model's directory: {shown(name)}"
            )
        return name

    def folder(self, name: str) -> Checkpoint:
        """A directory of this one as a checkpoint of its own; this one where the name is empty.

        Raises:
            ValueError: the checkpoint is on the hub, or has no such directory.
        """
        if not name:
            return self
        path = Path(self.name, name)
        if not self.is_local or not path.is_dir():
            raise ValueError(
                f"{self.name}/modules.json: expected a Transformer in the model's own directory, "
                f"or in one that a local model has, got {shown(name)}"
            )
        return replace(self, name=str(path))


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever a library raises for a damaged file as a ValueError of one line, its name first.

    A library's checks are not complete: a value of another type than it expects ends in as many
    kinds of errors as there are uses of it.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load report: what matters is said in own words."""
    verbosity, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

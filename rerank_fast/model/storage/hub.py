"""The hub: a repository for a model, and what is uploaded to it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


def create_repository(repo_id: str, *, private: bool, token: str | bool | None) -> None:
    """Make the model repository on the hub, where there is none yet.

    Raises:
        ValueError: the id is not one, the hub is offline, or it refuses.
    """
    with _hub_errors(repo_id):
        HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)


def push(
    save_to: Callable[[Path], None], repo_id: str, *, private: bool, token: str | bool | None
) -> str:
    """Save to a temporary directory and upload that; returns the commit's URL."""
    create_repository(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as directory:
        save_to(Path(directory))
        with _hub_errors(repo_id):
            commit = HfApi(token=token).upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message="Upload a reranker with rerank_fast",
            )
    return str(commit.commit_url)


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """The hub's refusals as one line that names the repository; none of them holds the token."""
    try:
        yield
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if isinstance(error, OfflineModeIsEnabled):
            raise ValueError(
                f"can't push to {repo_id}: the hub is offline (HF_HUB_OFFLINE)"
            ) from error
        raise ValueError(
            f"can't push to {repo_id}: {' '.join(str(error).split())[:400]}"
        ) from error

"""Embeddings of texts, block by block, in memory or in a folder that later runs read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from rerank_fast.data.output_errors import writing

_BLOCK = 4096  # texts encoded between two writes


def embed(
    texts: Sequence[str],
    encode: Callable[[list[str]], Any],
    *,
    normalize: bool,
    dtype: str,
    cache: Path | None,
    description: str,
    show_progress_bar: bool,
) -> np.ndarray:
    """(N, d) embeddings of the texts in fp16 or fp32, of length 1 where normalize is set.

    cache is the .npy file that holds them: read through a memory map where it is there, else
    written as the blocks come. An interrupted run leaves what it has done beside it, and the next
    one goes on from there.

    Raises:
        ValueError: the encoder's output is not (texts, d), or is not finite; the cache is damaged
            or can't be written.
    """
    if cache is not None and cache.exists():
        return _mapped(cache)
    part = cache.with_name(f"{cache.name}.part") if cache else None
    state = cache.with_name(f"{cache.name}.part.json") if cache else None
    array: np.ndarray | None = None
    done = 0
    if part is not None and state is not None and part.exists() and state.exists():
        array, done = _begun(part, state)
    with tqdm(
        total=len(texts), initial=done, desc=description, disable=not show_progress_bar
    ) as bar:
        for start in range(done, len(texts), _BLOCK):
            block = list(texts[start : start + _BLOCK])
            rows = _checked(encode(block), len(block), array)
            if normalize:
                rows = torch.nn.functional.normalize(rows, dim=1)
            if array is None:
                shape = (len(texts), rows.shape[1])
                array = np.empty(shape, dtype) if part is None else _allocated(part, dtype, shape)
            array[start : start + len(block)] = rows.numpy()
            if state is not None and isinstance(array, np.memmap):
                array.flush()
                with writing(state):
                    _write(state, json.dumps({"done": start + len(block)}))
            bar.update(len(block))
    assert array is not None
    if cache is None or part is None or state is None:
        return array
    del array
    os.replace(part, cache)
    state.unlink(missing_ok=True)
    return _mapped(cache)


def _mapped(cache: Path) -> np.ndarray:
    try:
        return np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"the embeddings in {cache} are damaged, remove the file: {error}"
        ) from error


def _begun(part: Path, state: Path) -> tuple[np.ndarray, int]:
    """What an interrupted run left, and how many texts of it are done."""
    try:
        array = np.lib.format.open_memmap(part, mode="r+")
        done = json.loads(state.read_text())["done"]
        if not isinstance(done, int) or not 0 <= done <= len(array):
            raise ValueError(f"{done!r:.40} of {len(array)} texts are done")
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise ValueError(
            f"the embeddings of an interrupted run in {part} are damaged, remove it and {state}: "
            f"{error}"
        ) from error
    return array, done


def _allocated(part: Path, dtype: str, shape: tuple[int, int]) -> np.ndarray:
    """A file's array with its blocks on the disk: writing to a map without them ends a process."""
    with writing(part):
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if hasattr(os, "posix_fallocate"):
            with part.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return array


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _checked(output: Any, count: int, array: np.ndarray | None) -> torch.Tensor:
    if isinstance(output, list | tuple) and output and isinstance(output[0], torch.Tensor):
        output = torch.stack(list(output))
    rows = torch.as_tensor(
        output if isinstance(output, torch.Tensor) else np.asarray(output)
    ).detach()
    width = (
        rows.shape[1]
        if array is None and rows.dim() == 2
        else array.shape[1]
        if array is not None
        else "d"
    )
    if tuple(rows.shape) != (count, width):
        raise ValueError(
            f"the encoder gave {tuple(rows.shape)} for {count} texts, expected ({count}, {width})"
        )
    rows = rows.float().cpu()
    if not torch.isfinite(rows).all():
        raise ValueError("the encoder gave an embedding that is not finite")
    return rows

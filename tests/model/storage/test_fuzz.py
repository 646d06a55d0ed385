"""Model directories with one file damaged at random: one line that names it, or a model that
scores.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rerank_fast import CrossEncoder
from tests.model_factory import make_tiny_bert, make_tiny_qwen3

PAIRS = [("what is a panda", "a panda is a kind of bear"), ("rain", "")]
# Values of other types than a file's own, and extreme ones of its own.
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    2.5,
    float("nan"),
    "",
    "text",
    "../x",
    [],
    [3],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {"bert": make_tiny_bert(root / "bert"), "qwen3": make_tiny_qwen3(root / "qwen3")}
    for name, directory in made.items():
        CrossEncoder(directory, device="cpu").save_pretrained(root / f"saved-{name}")
    return {name: root / f"saved-{name}" for name in made}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value in JSON; of a long list or object the first entries."""
    yield path
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in list(entries)[:20]:
        yield from paths(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], by)
    return copy


def without(value: Any, path: tuple[Any, ...]) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = without(copy[path[0]], path[1:])
    return copy


def damage(draw: random.Random, file: Path) -> str:
    """Damages the file; returns what was done."""
    content = file.read_bytes()
    kind = draw.choice(
        ["flip", "flip", "truncate", "remove", "value", "value", "value", "without", "foreign"]
    )
    if kind in ("value", "without") and file.suffix == ".json":
        value = json.loads(content)
        path = draw.choice(list(paths(value)))
        by = draw.choice(VALUES)
        changed = without(value, path) if kind == "without" and path else replaced(value, path, by)
        file.write_text(json.dumps(changed))
        return f"{kind} {path} {by!r}"
    if kind == "remove":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "foreign":
        file.write_bytes(draw.randbytes(draw.randrange(200)))
    else:
        flipped = bytearray(content)
        # The beginning of a safetensors file is its header.
        for _ in range(draw.randrange(1, 4)):
            flipped[draw.randrange(min(len(content), draw.choice([8, 2000, len(content)])))] ^= (
                1 << draw.randrange(8)
            )
        file.write_bytes(flipped)
    return kind


def check(models: dict[str, Path], tmp_path: Path, seed: int) -> bool:
    """Whether the damaged model opened."""
    draw = random.Random(seed)
    directory = tmp_path / "model"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(models[draw.choice(list(models))], directory)
    files = sorted(file for file in directory.rglob("*") if file.suffix != ".md" and file.is_file())
    file = draw.choice(files)
    done = f"seed {seed}: {file.relative_to(directory)}: {damage(draw, file)}"
    try:
        model = CrossEncoder(directory, device="cpu")
        scores = model.predict(PAIRS)
    except ValueError as error:
        said = str(error)
        assert "\n" not in said, done
        assert "model" in said, done
        return False
    except BaseException as error:
        raise AssertionError(f"{done} gave {type(error).__name__}: {error}") from error
    assert scores.shape == (2,), done
    # A weight of 1e38 is one: what is flipped in a number, the format can't tell.
    assert np.isfinite(scores).all() or file.suffix == ".safetensors", done
    return True


def fuzz(models: dict[str, Path], tmp_path: Path, seeds: range) -> None:
    logging.disable(logging.WARNING)  # of missing weights, hundreds of times
    try:
        opened = sum(check(models, tmp_path, seed) for seed in seeds)
    finally:
        logging.disable(logging.NOTSET)
    assert len(seeds) // 20 < opened < len(seeds)  # else nothing was damaged, or all was


def test_damaged_model_directories(models: dict[str, Path], tmp_path: Path):
    fuzz(models, tmp_path, range(200))


@pytest.mark.slow
def test_many_damaged_model_directories(models: dict[str, Path], tmp_path: Path):
    fuzz(models, tmp_path, range(1000, 6000))

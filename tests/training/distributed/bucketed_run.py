"""Steps in each of two processes, their gradients beside those of one process with all lists:
torchrun -m ...bucketed_run MODEL LISTS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rerank_fast import CrossEncoder
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists
from rerank_fast.objectives.lambda_loss import LambdaLoss
from rerank_fast.training.backward import Backward
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import buckets, collectives
from rerank_fast.training.run_log import Rates
from rerank_fast.training.weights import TrainedWeights

FULL = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
buckets._BUCKET = 400  # elements, so that there are many


@contextmanager
def noted_messages() -> Iterator[list[int]]:
    """The elements of each message that leaves."""
    sizes: list[int] = []
    real = dist.all_reduce

    def all_reduce(flat: Tensor, **options: Any) -> Any:
        sizes.append(flat.numel())
        return real(flat, **options)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = real


def out_of_memory_once(weight: Tensor) -> Any:
    """When its gradient has been computed; by a hook, to be removed."""
    failed: list[bool] = []

    def fail(gradient: Tensor) -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError(FULL)

    return weight.register_hook(fail)


def step(
    model: CrossEncoder, trained: TrainedWeights, shares: list[list[TokenizedLists]], **run: Any
) -> dict[str, Any]:
    """A step of this process's share: its gradient's distance from that of all in one process."""
    rank, fails, tokens = dist.get_rank(), run.pop("fails", ""), run.pop("tokens", 4096)
    config = TrainingConfig(precision="fp32", **run)
    parameters = dict(model.model.named_parameters())

    def backward(*final: Any) -> Backward:
        arguments = (lambda value: value, trained.forget_gradients, tokens, *final)
        return Backward(model, config, LambdaLoss(), *arguments)

    everything = [part for share in shares for part in share]
    units = 100.0
    loss, _ = backward()(everything, units, Rates())
    expected = {name: one.grad for name, one in parameters.items()}
    trained.forget_gradients()
    hook = None
    if fails and rank == 1:
        (name,) = [name for name in parameters if name.endswith(fails)]
        hook = out_of_memory_once(parameters[name])
    totals = torch.zeros(7)
    with noted_messages() as sizes:
        totals[0], totals[1] = backward(trained.final)(shares[rank], units, Rates())
        early = len(sizes)
        trained.sum_gradients(totals)
    if hook is not None:
        hook.remove()
    distance = max(
        float((one.grad - (0 if expected[name] is None else expected[name])).abs().max())
        for name, one in parameters.items()
        if one.grad is not None
    )
    same_loss = float((totals[0] - loss).abs())
    trained.forget_gradients()
    return {"early": early, "sizes": sizes, "distance": distance, "loss": same_loss}


def main(path: str, lists_path: str) -> None:
    collectives.join_processes(60)
    model = CrossEncoder(path, device="cpu")
    model.model.eval()  # no dropout: another cut of a batch would draw another
    trained = TrainedWeights(model, TrainingConfig(precision="fp32"))
    with open(lists_path) as file:
        lists = tokenize_lists(json.load(file), model)
    a, b, c = (lists.select(np.arange(at, len(lists), 3)) for at in range(3))
    whole = {"direct": {"gradient_cache": "off"}, "cached": {"gradient_cache": "on"}}
    found: dict[str, Any] = {}
    for name, options in whole.items():
        cases: dict[str, tuple[list[list[TokenizedLists]], dict[str, Any]]] = {
            "equal": ([[a], [b]], {}),
            "accumulated": ([[a, b], [c]], {}),
            "micro-batches": ([[a], [b, c]], {"tokens": 60}),
            "no lists": ([[a], []], {}),
            "memory runs out": ([[a], [b]], {"fails": "word_embeddings.weight"}),
        }
        for case, (shares, more) in cases.items():
            mine = step(model, trained, shares, **options, **more)
            found[f"{name}, {case}"] = collectives.gather(mine)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

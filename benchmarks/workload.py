"""The workload that the benchmarks share: MS MARCO-like lists, and a training step of them, ours
and the peer's.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.losses import LambdaLoss

from rerank_fast import Trainer, TrainingConfig
from rerank_fast.demo import encoder_directory
from rerank_fast.losses import LambdaLoss as DropIn

_WORDS = (
    "river stone people population city weather question model light water energy history music "
    "price doctor law"
)


def words_like_marco(generator: np.random.Generator, length: int | None = None) -> str:
    """A text of this many words; None draws it as MS MARCO's passages have them."""
    length = length or int(np.clip(generator.lognormal(4.3, 0.45), 10, 240))
    return " ".join(generator.choice(_WORDS.split(), length))


def marco_like_lists(
    num_lists: int, *, seed: int = 0, log_words: float = 4.3, spread: float = 0.45, most: int = 240
) -> list[dict]:
    """Lists of 3 to 10 documents of log-normal length: about 92 tokens a pair in the mean."""
    generator = np.random.default_rng(seed)
    words = _WORDS.split()
    lists = []
    for _ in range(num_lists):
        size = int(generator.integers(3, 11))
        lengths = np.clip(generator.lognormal(log_words, spread, size), 10, most).astype(int)
        docs = [" ".join(generator.choice(words, length)) for length in lengths]
        labels = [0] * size
        labels[int(generator.integers(size))] = 1
        lists.append(
            {"query": " ".join(generator.choice(words, 7)), "docs": docs, "labels": labels}
        )
    return lists


def encoder() -> str:
    """Directory of MiniLM-L6."""
    try:
        return encoder_directory()
    except ValueError as error:
        pytest.skip(str(error))


@dataclass
class Steps:
    """The same step, three times, each in the precision that is fastest here; describe says of what
    lengths.
    """

    ours: Callable[[], object]
    peer: Callable[[], object]
    drop_in: Callable[[], object]  # the peer's, with this package's loss
    describe: str
    dtype: torch.dtype  # of our products
    matrix_flops: float  # multiplications and additions that ours can't do without


def make_steps(
    lists: list[dict],
    output: str,
    *,
    mini_batch_size: int,
    max_length: int = 256,
    model: str | None = None,
) -> Steps:
    """A step of the Trainer, and one as sentence-transformers' trainer takes it, at its
    mini_batch_size.

    Of MiniLM-L6, where no directory of a model is given.
    """
    config = TrainingConfig(output=output, max_length=max_length, show_progress_bar=False)
    trainer = Trainer(model or encoder(), lists, config=config)
    trainer.model.train()
    batch = next(trainer.batches())
    lengths = batch.lists.pairs.lengths
    shape = trainer.model.model.config
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    # Forward and two products backward. Of the last layer keys and values alone are needed for
    # every token.
    weights = (layers - 1) * (4 * hidden**2 + 2 * hidden * shape.intermediate_size) + 2 * hidden**2
    peer = {"mini_batch_size": mini_batch_size, "max_length": max_length, "model": model}
    return Steps(
        ours=lambda: trainer.step(batch),
        peer=make_peer_step(lists, **peer),
        drop_in=make_peer_step(lists, loss_class=DropIn, **peer),
        describe=f"{len(lengths)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} "
        "tokens",
        dtype={"fp32": torch.float32, "fp16": torch.float16}.get(
            trainer.config.precision, torch.bfloat16
        ),
        matrix_flops=6.0 * weights * int(lengths.sum()),
    )


def make_peer_step(
    *batches: list[dict],
    mini_batch_size: int,
    max_length: int = 256,
    loss_class: type[torch.nn.Module] = LambdaLoss,
    gradient_checkpointing: bool = False,
    precision: str | None = None,
    model: str | None = None,
) -> Callable[..., object]:
    """A step as sentence-transformers' trainer takes it, on the first of the batches or that of an
    index.

    In its fastest precision, unless one is given: bf16 or no.
    """
    precision = precision or peer_precision()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer_model = PeerCrossEncoder(
        model or encoder(), num_labels=1, max_length=max_length, device=device
    )
    if gradient_checkpointing:
        peer_model[0].auto_model.gradient_checkpointing_enable()
    peer_model.train()
    # Of a process there is one, in one precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    # What their trainer does about bf16: an autocast on the model's forward.
    peer_model = Accelerator(mixed_precision=precision, cpu=device == "cpu").prepare(peer_model)
    loss = loss_class(peer_model, mini_batch_size=mini_batch_size)
    optimizer = torch.optim.AdamW(peer_model.parameters(), lr=2e-5, fused=True)
    prepared = [
        (
            [[row["query"] for row in lists], [row["docs"] for row in lists]],
            [torch.tensor(row["labels"]) for row in lists],
        )
        for lists in batches
    ]

    def peer(which: int = 0) -> None:
        loss(*prepared[which]).backward()
        torch.nn.utils.clip_grad_norm_(peer_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peer


@functools.cache
def peer_precision() -> str:
    """The mixed precision in which sentence-transformers' step is faster here, by a short one of
    each.

    A process takes it from RERANK_FAST_BENCH_PEER_PRECISION, where another one has measured.
    """
    if measured := os.environ.get("RERANK_FAST_BENCH_PEER_PRECISION"):
        return measured
    lists = marco_like_lists(2, log_words=3.3, most=60)
    seconds: dict[str, float] = {}
    for precision in ("bf16", "no"):
        step = make_peer_step(lists, mini_batch_size=16, precision=precision)
        step()
        times = []
        for _ in range(2):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        seconds[precision] = statistics.median(times)
    return min(seconds, key=lambda precision: seconds[precision])

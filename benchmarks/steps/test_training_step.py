"""One training step of the published shape: 16 lists of 3-10 documents, MS MARCO-like lengths.

Each side in the precision that is fastest on this machine. Beside it, in the same rounds: the
drop-in loss in sentence-transformers' own step, and the step's share of the machine's matrix peak.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.steps.training import OurStep, make_peer_step, make_step
from benchmarks.timing import Call
from benchmarks.workload import marco_like_lists
from rerank_fast.losses import LambdaLoss as DropIn

PRODUCT = 2048  # rows and columns of the matrices whose products are the peak


def products_of(step: OurStep) -> tuple[int, Call]:
    """As much matrix arithmetic as a step has, as large products in its dtype; their number."""
    a, b = (torch.randn(PRODUCT, PRODUCT, dtype=step.dtype) for _ in range(2))
    number = round(step.matrix_flops / (2 * PRODUCT**3))

    def run() -> None:
        for _ in range(number):
            a @ b.t()

    return number, run


def test_step(interleaved, note, tmp_path):
    lists = marco_like_lists(16)
    ours = make_step(lists, str(tmp_path))
    # One changed import: their model, their optimizer, text tokenised inside the loss.
    peer, drop_in = make_peer_step(lists), make_peer_step(lists, loss_class=DropIn)
    number, products = products_of(ours)
    medians = interleaved(
        {"ours": ours.run, "drop-in": drop_in.run, "products": products, "peer": peer.run},
        rounds=3 if ours.dtype == torch.bfloat16 else 2,  # one of fp32 takes 30 to 50 seconds
        warm_up={"peer": peer.small},
    )
    note(f"step, {ours.describe}", medians["ours"], medians["peer"])
    note(f"drop-in, {ours.describe}", medians["drop-in"], medians["peer"])
    case = f"step, peer its arithmetic as {number} products of {PRODUCT}^3"
    dtype = str(ours.dtype).removeprefix("torch.")
    note(case, medians["ours"], medians["products"], remark=dtype)


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
    ours = make_step(lists, str(tmp_path), max_length=max_length)
    peer = make_peer_step(lists, max_length=max_length)
    compare(f"step, {name}: {ours.describe}", ours.run, peer.run, rounds=3)


@pytest.mark.slow
def test_a_larger_batch_of_the_peer(compare, tmp_path):
    """32 pairs a forward is the other setting that users try; the whole batch at once pads most."""
    lists = marco_like_lists(16)
    ours, peer = make_step(lists, str(tmp_path)), make_peer_step(lists, mini_batch_size=32)
    compare(f"step, {ours.describe}, peer 32 a forward", ours.run, peer.run, rounds=3)


@pytest.mark.slow
def test_compiled_step(compare, tmp_path):
    """torch_compile beside the eager step, both ours."""
    lists = marco_like_lists(16)
    compiled = make_step(lists, str(tmp_path / "compiled"), torch_compile=True)
    eager = make_step(lists, str(tmp_path / "eager"))
    compare("step under torch_compile, peer the eager one", compiled.run, eager.run, rounds=3)

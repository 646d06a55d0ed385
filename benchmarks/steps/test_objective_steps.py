"""A training step by every objective beside LambdaLoss's: they should cost the same."""

from __future__ import annotations

import pytest

from benchmarks.steps.training import make_step
from benchmarks.workload import marco_like_lists
from rerank_fast.objectives import NAMES


@pytest.mark.slow
def test_steps_of_objectives(interleaved, note, tmp_path):
    """In the same rounds; a quarter of the published batch, of which the loss is the larger
    share.
    """
    lists = marco_like_lists(4)
    steps = {name: make_step(lists, str(tmp_path / name), objective=name) for name in NAMES}
    medians = interleaved({name: step.run for name, step in steps.items()}, rounds=5)
    texts = steps["lambda_loss"].describe
    for name in NAMES:
        if name != "lambda_loss":
            case = f"step by {name}, peer by lambda_loss, {texts}"
            note(case, medians[name], medians["lambda_loss"])

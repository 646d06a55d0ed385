"""Devices without kernels of ours, as Apple's and Intel's: everything runs, in fp32 at most, and
draws again what it drew. A device that computes on the host stands in for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils import backend_registration

from tests.model_factory import make_tiny_bert

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no device that is written in Python",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("other_device")
    program = Path(__file__).with_name("other_device_run.py")
    root = Path(__file__).parents[2]
    model = make_tiny_bert(directory / "model")
    done = subprocess.run(
        [sys.executable, str(program), str(model), str(directory / "runs")],
        env={**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_scores_as_on_the_host(found: dict[str, Any]):
    host, device = found["scores"]
    np.testing.assert_allclose(device, host, rtol=1e-5)


def test_the_gradient_cache_draws_the_same_dropout_again(found: dict[str, Any]):
    assert found["generators"] == 2  # the host's and the device's own
    direct, cached = found["names"]
    assert direct == cached > 30
    assert found["distance"] < 1e-4


def test_ops_run_through_the_reference_without_fp64(found: dict[str, Any]):
    host, device = found["ops"]
    for ours, expected in zip(device, host, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)

"""A process that goes on scoring does not go on growing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rerank_fast.ops.int8_linear import onednn_available
from tests.model_factory import make_tiny_bert


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="Linux says there how much memory a process has"
)
@pytest.mark.parametrize(
    ("dtype", "path"),
    [("float32", "packed"), ("bfloat16", "packed"), ("int8", "packed"), ("bfloat16", "padded")],
)
def test_memory_stays_flat_over_ever_new_lengths(dtype: str, path: str, tmp_path: Path) -> None:
    """In a process of its own, whose caches are empty; a primitive for every number of rows adds
    100 MiB.
    """
    if dtype == "int8" and not onednn_available():
        pytest.skip("oneDNN's int8 product is not there")
    directory = str(make_tiny_bert(tmp_path / "bert"))
    command = [sys.executable, "-m", "tests.model.growing_run", directory, dtype, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 32

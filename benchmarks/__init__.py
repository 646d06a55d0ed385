"""Benchmarks: ops/ by themselves, steps/ of training and inference, tools/ that report and profile.

`pytest benchmarks/ --benchmark-only` compares, `python -m benchmarks.<room>.<script> --help` runs
one script, `python -m benchmarks report` renews the documents' tables. None needs a network.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

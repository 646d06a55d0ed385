"""Where the host waits for the device in a step and in scoring, beside what the GPU model says."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.tools import gpu_model
from benchmarks.tools.gpu_parts import workloads
from benchmarks.tools.gpu_parts.results import Results
from benchmarks.tools.gpu_parts.timing import Unobserved

_ROOT = Path(__file__).parents[3]


def run(results: Results) -> None:
    for shape in ("MiniLM-L6",) if results.dry else ("MiniLM-L12", "ModernBERT-base"):
        modelled = gpu_model.our_rows(shape)
        for what, call in workloads.our_runs(results.device, shape, small=results.dry).items():
            places = waits(lambda call=call: call(Unobserved()), results.device)
            counted = next(row for row in modelled if row.what.startswith(what))
            results.add(
                f"{shape}, {what}",
                measured_waits=None if places is None else sum(places.values()),
                measured_places=places,
                modelled_waits=counted.total().syncs,
            )


def waits(call: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Times that the host waited, by the line that did; None without a GPU. The first call is left
    out."""
    call()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found = [one for one in caught if "synchronizing" in str(one.message)]
    return dict(Counter(f"{_short(one.filename)}:{one.lineno}" for one in found))


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "/".join(path.parts[-3:])

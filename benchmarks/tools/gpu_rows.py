"""What was counted and measured of one run, and what a driver adds to the host's time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.tools.gpu_counts import CARDS, TRITON, Tally

# Besides what torch does for an operation: cudaLaunchKernel on a current server; and what Triton's
# launcher in C takes to read the arguments. The rest of it is in Python, and measured.
LAUNCH_SECONDS = 2.5e-6
TRITON_SECONDS = 1.5e-6
# An assumption for what cudaGraphLaunch takes of each kernel in a graph, beside one launch: NVIDIA
# gives 2 us and 0.2 a node for CUDA 11.8, and 2.5 us with next to nothing a node for graphs in a
# straight line since CUDA 12.6. The dearer of both.
NODE_SECONDS = 0.2e-6


@dataclass
class Row:
    """One thing that was run, in its phases."""

    shape: str
    what: str
    phases: dict[str, Tally]
    # Seconds measured by phase; empty: not measured.
    host: dict[str, float] = field(default_factory=dict)

    def total(self) -> Tally:
        total = Tally()
        for one in self.phases.values():
            total.operations += one.operations
            total.uploads += one.uploads
            total.uploaded_bytes += one.uploaded_bytes
            total.waits += one.waits
            total.reads += one.reads
            total.replays += one.replays
        return total

    def host_seconds(self, phase: str | None = None) -> float | None:
        """With the driver's share."""
        if not self.host:
            return None
        tally = self.total() if phase is None else self.phases[phase]
        measured = sum(self.host.values()) if phase is None else self.host.get(phase, 0.0)
        own = sum(one.launches for one in tally.launched if one.name in TRITON)
        driver = tally.launches * LAUNCH_SECONDS + sum(tally.replays) * NODE_SECONDS
        return measured + driver + own * TRITON_SECONDS

    def as_json(self) -> dict[str, Any]:
        phases = {}
        for name, tally in self.phases.items():
            phases[name] = {
                "launches": tally.launches,
                "kernels_of_replays": tally.replays,
                "uploads": tally.uploads,
                "uploaded_bytes": tally.uploaded_bytes,
                "waits": tally.waits,
                "reads": tally.reads,
                "bytes": tally.bytes,
                "flops": tally.flops,
                "launches_by_name": tally.by_name(),
                "device_seconds": {card.name: tally.seconds(card) for card in CARDS},
                "device_seconds_by_name": tally.seconds_by_name(CARDS[0]),
                "host_seconds": self.host_seconds(name),
            }
        return {"shape": self.shape, "what": self.what, "phases": phases}

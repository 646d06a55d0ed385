"""Energy and carbon of a run through codecarbon, where it is installed; nothing is looked up on the
network.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Energy:
    """What codecarbon estimated for the machine while the run lasted."""

    kwh: float
    kg_co2: float
    country: str | None  # whose grid kg_co2 is of; None is the world's mean
    cpu_model: str
    ram_gib: float
    on_cloud: bool


class _Latest:
    """What codecarbon has told last, to which this is an output like a file."""

    data: Any = None

    def out(self, total: Any, delta: Any) -> None:
        self.data = total

    def live_out(self, total: Any, delta: Any) -> None: ...

    def exit(self) -> None: ...


class EnergyMeter:
    """Measures from start() to stop(), as codecarbon's offline tracker does.

    The country whose electricity the carbon is of comes from CODECARBON_COUNTRY_ISO_CODE (FRA, USA,
    ...) or from codecarbon's own .codecarbon.config; without one it is the world's mean.
    """

    def __init__(self) -> None:
        self._tracker: Any = None
        self._latest = _Latest()
        self._before: Energy | None = None

    def start(self, before: Energy | None = None) -> None:
        """Begin to measure; `before` is what an interrupted run has taken that goes on here."""
        self._before = before
        if importlib.util.find_spec("codecarbon") is None:
            return
        from codecarbon import OfflineEmissionsTracker

        # It talks before it reads log_level.
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        tracker = OfflineEmissionsTracker(
            project_name="rerank_fast",
            output_methods=[],  # no file, nothing sent
            log_level="critical",
            allow_multiple_runs=True,
            output_handlers=[self._latest],
        )
        try:
            tracker.start()
        except (
            Exception
        ) as error:  # it swallows those of its constructor, and then lacks attributes
            logger.warning("codecarbon could not start: %s: %s", type(error).__name__, error)
        else:
            self._tracker = tracker

    def so_far(self) -> Energy | None:
        """None without codecarbon, or where it could not measure."""
        if self._tracker is None:
            return None
        self._tracker.flush()
        return self._measured()

    def stop(self) -> Energy | None:
        """As so_far(), at the end."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return None
        tracker.stop()
        energy = self._measured()
        if energy is None:
            logger.warning("codecarbon gave no figures for this run.")
        return energy

    def _measured(self) -> Energy | None:
        data, before = self._latest.data, self._before
        if data is None:
            return None
        return Energy(
            kwh=float(data.energy_consumed) + (before.kwh if before else 0.0),
            kg_co2=float(data.emissions) + (before.kg_co2 if before else 0.0),
            country=data.country_name,
            cpu_model=str(data.cpu_model or ""),
            ram_gib=float(data.ram_total_size),
            on_cloud=str(data.on_cloud).upper() == "Y",
        )

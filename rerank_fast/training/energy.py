"""Energy and carbon of a run through codecarbon, where it is installed; nothing is looked up on the network."""

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


class EnergyMeter:
    """Measures from start() to stop(), as codecarbon's offline tracker does.

    The country whose electricity the carbon is of comes from CODECARBON_COUNTRY_ISO_CODE (FRA, USA, ...) or from
    codecarbon's own .codecarbon.config; without one it is the world's mean.
    """

    def __init__(self) -> None:
        self._tracker: Any = None

    def start(self) -> None:
        if importlib.util.find_spec("codecarbon") is None:
            return
        from codecarbon import OfflineEmissionsTracker

        # It talks before it reads log_level.
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        tracker = OfflineEmissionsTracker(
            project_name="rerank_fast",
            save_to_file=False,
            save_to_api=False,
            log_level="critical",
            allow_multiple_runs=True,
        )
        try:
            tracker.start()
        except Exception as error:  # it swallows those of its constructor, and then lacks attributes
            logger.warning("codecarbon could not start: %s: %s", type(error).__name__, error)
        else:
            self._tracker = tracker

    def stop(self) -> Energy | None:
        """None without codecarbon, or where it could not measure."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return None
        tracker.stop()
        data = getattr(tracker, "final_emissions_data", None)
        if data is None:
            logger.warning("codecarbon gave no figures for this run.")
            return None
        return Energy(
            kwh=float(data.energy_consumed),
            kg_co2=float(data.emissions),
            country=data.country_name,
            cpu_model=str(data.cpu_model or ""),
            ram_gib=float(data.ram_total_size),
        )

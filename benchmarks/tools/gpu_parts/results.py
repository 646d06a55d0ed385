"""What a part of the check has found, on disk after every row: a part that is stopped leaves what
it had."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Values under names that begin so are a GPU's alone.
MEASURED = "measured_"


@dataclass
class Results:
    """Of one part.

    Args:
        file: the JSON file that they are written to.
        dry: run small, without a GPU: nothing is measured.
    """

    file: Path
    dry: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def add(self, what: str, **values: Any) -> dict[str, Any]:
        """One more row, which may be changed and written again.

        Raises:
            ValueError: a dry run claims to have measured something.
        """
        found = [key for key in values if key.startswith(MEASURED) and values[key] is not None]
        if self.dry and found:
            raise ValueError(f"a dry run measures nothing, got {', '.join(found)} of {what}")
        row = {"what": what, **values}
        self.rows.append(row)
        self.write()
        return row

    def write(self, state: str = "running") -> None:
        device = "none: a dry run" if self.dry else torch.cuda.get_device_name()
        write_json(self.file, {"device": device, "state": state, "rows": self.rows})

    def other(self, part: str) -> list[dict[str, Any]]:
        """Rows of a part that has run before; none where it has not."""
        file = self.file.with_name(f"{part}.json")
        return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(beside, file)


def rate(amount: float, seconds: float | None) -> float | None:
    """Of something a second; None where no time was measured."""
    return None if seconds is None else amount / seconds

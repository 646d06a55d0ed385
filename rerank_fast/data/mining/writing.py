"""Lists written as they come, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.parquet

from rerank_fast.data.files import open_parquet
from rerank_fast.data.lists import FEATURES
from rerank_fast.data.output_errors import writing

_ROWS = 1024  # of a Parquet row group


class ListWriter:
    """Writes lists to a .jsonl or .parquet file, one query after the other.

    A .jsonl file grows line by line; a .parquet file is made at the end from OUTPUT.partial.jsonl.
    Beside it OUTPUT.mining.json holds the settings of the run and whether it is complete.

    Args:
        output: the file.
        settings: whatever decides the lists, as JSON values.
        queries: in the order in which their lists come; a query may have none.
        overwrite: begin anew where the file exists.

    Raises:
        ValueError: another suffix, no such directory, a file that no mining run wrote, or one with
            other settings. From every method: the output can't be written; what was flushed before
            stays.
    """

    def __init__(
        self,
        output: Path,
        settings: Mapping[str, Any],
        queries: Sequence[str],
        *,
        overwrite: bool = False,
    ) -> None:
        check_output(output)
        self.output = output
        self._lines = (
            output
            if output.suffix == ".jsonl"
            else output.with_name(f"{output.name}.partial.jsonl")
        )
        self._state = output.with_name(f"{output.name}.mining.json")
        self.position = 0  # the first query that has not been written
        self.lists = 0  # written so far, by earlier runs too
        self._settings = json.loads(json.dumps(settings))
        self.complete = False
        with writing(output):
            if overwrite:
                for file in (output, self._lines, self._state):
                    file.unlink(missing_ok=True)
            if self._state.exists():
                self.complete = self._read_state()
                self._resume(queries)
            elif output.exists() or self._lines.exists():
                raise ValueError(
                    f"{output} exists, and no mining run wrote it: choose another output or "
                    "overwrite it"
                )
            else:
                self._write_state()

    def __enter__(self) -> ListWriter:
        with writing(self._lines):
            self._file = (
                None if self.complete else open(self._lines, "a", encoding="utf-8", newline="\n")
            )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with writing(self._lines):
                self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None
        with writing(self._lines):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.lists += 1

    def flush(self) -> None:
        """What has been written survives the end of the process."""
        assert self._file is not None
        with writing(self._lines):
            self._file.flush()

    def finish(self) -> None:
        """Close the file and mark it as complete."""
        assert self._file is not None
        with writing(self.output):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if self.output.suffix == ".parquet":
                self._to_parquet()
            self.complete = True
            self._write_state()
            if self._lines != self.output:
                self._lines.unlink()

    def _read_state(self) -> bool:
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            before, complete = dict(state["settings"]), bool(state["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._state} is not the state of a mining run: {error}") from error
        changed = [
            name
            for name in {**before, **self._settings}
            if before.get(name) != self._settings.get(name)
        ]
        written = [
            file for file in (self._lines, self.output) if file.exists() and file.stat().st_size
        ]
        if changed and not written:
            self._write_state()
        elif changed:
            changes = ", ".join(
                f"{name} {before.get(name)!r} -> {self._settings.get(name)!r}" for name in changed
            )
            raise ValueError(
                f"{self.output} was mined with other settings ({changes}): choose another output "
                "or overwrite it"
            )
        return complete and self.output.exists()

    def _write_state(self) -> None:
        temporary = self._state.with_name(f"{self._state.name}.tmp")
        state = {"complete": self.complete, "settings": self._settings}
        temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self._state)

    def _resume(self, queries: Sequence[str]) -> None:
        """Find the position after the last whole line, and drop what follows it in an incomplete
        file.
        """
        if self.complete and self.output.suffix == ".parquet":
            self.lists = open_parquet(self.output).metadata.num_rows
            return
        if not self._lines.exists():
            return
        end = 0
        with open(self._lines, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and not self.complete:
                    break
                try:
                    query = json.loads(line)["query"]
                    self.position = queries.index(query, self.position) + 1
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self._lines}, line {number}: not a list of this run; overwrite the file "
                        "to begin anew"
                    ) from error
                end += len(line)
                self.lists += 1
        if end < self._lines.stat().st_size:
            os.truncate(self._lines, end)

    def _to_parquet(self) -> None:
        temporary = self.output.with_name(f"{self.output.name}.tmp")
        schema = FEATURES.arrow_schema
        try:
            with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
                for rows in _batches(self._lines):
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            os.replace(temporary, self.output)
        finally:
            temporary.unlink(missing_ok=True)  # of a full disk


def check_output(output: Path) -> None:
    """Raises ValueError where lists can't be written there."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"output must be a .jsonl or .parquet file, got {output}")
    if not output.parent.is_dir():
        raise ValueError(f"output {output}: directory {output.parent} does not exist")


def _batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    with open(lines, encoding="utf-8") as file:
        rows: list[dict[str, Any]] = []
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == _ROWS:
                yield rows
                rows = []
        if rows:
            yield rows

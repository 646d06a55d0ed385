"""rerank-fast score: the pairs of a file of any size, in parts that a killed run leaves usable."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from accelerate import PartialState
from tqdm.auto import tqdm

from rerank_fast.data.output_errors import writing
from rerank_fast.data.output_lock import locked
from rerank_fast.data.pairs import PairBlock, PairFile, as_text
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.texts import check_text, one_line
from rerank_fast.model.tokens.ahead import ahead
from rerank_fast.model.tokens.packing import TokenizedPairs
from rerank_fast.training.distributed.collectives import join_processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileScores:
    """rows: of the output; scored: pairs scored by this process in this run; truncated: of
    these.
    """

    rows: int
    scored: int
    truncated: int


def process_state() -> PartialState:
    """See join_processes: a process waits for the slowest one at the end, however long that
    takes.
    """
    return join_processes(timedelta(days=30).total_seconds())


def score_file(
    model: CrossEncoder,
    source: str | Path,
    output: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    rows_per_part: int = 4096,
    batch_size: int | None = None,
    prompt: str | None = None,
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> FileScores:
    """Write a Parquet file with the scores of a file's pairs, row for row.

    Rows are scored in parts, each written when it is done, to the directory OUTPUT.parts. A run
    that was killed goes on after them when it is started again, with the same arguments, on the
    same file and in any number of processes. Under accelerate launch each process scores every n-th
    part.

    Args:
        model: scores with its own activation function.
        source: .jsonl or .parquet with the columns query and document, or query and docs (a list).
        output: .parquet file with a column score, or scores (a list) where a row has docs. It
            appears when all is done.
        columns: where the source's columns have other names.
        keep: columns of the source to copy to the output; as text where JSON has values of several
            kinds in one.
        rows_per_part: rows that are in memory at a time, and that a kill may lose.
        batch_size: most pairs per forward pass; None lets their tokens decide.
        prompt: goes before each query; the instruction of a causal model.
        overwrite: replace the output, and parts of a run with other arguments.
        show_progress_bar: count the rows of this process's parts.

    Raises:
        ValueError: the output exists, another process writes it, or its parts are of another run;
            the source can't be read, a column is missing, or a row is malformed: names the file,
            the line or row and the field. Or a part is missing or damaged at the end, or a file
            can't be written, as on a full disk. Finished parts stay.
    """
    source, output = Path(source), Path(output)
    if rows_per_part < 1:
        raise ValueError(f"rows_per_part must be at least 1, got {rows_per_part}")
    file = PairFile(source, columns or {}, keep, rows_per_part)
    if prompt is not None:
        check_text(prompt, "prompt")
    for name in keep:
        if name in ("score", "scores"):
            raise ValueError(f"keep can't hold {name}: the output has a column of that name")
    state, parts = process_state(), output.with_name(output.name + ".parts")
    with ExitStack() as held:
        if state.is_main_process:
            _check_output(source, output)
            held.enter_context(locked(output))
            _prepare(output, parts, _run_id(model, file, prompt), overwrite)
        state.wait_for_everyone()
        scored, truncated, num_parts = _score_parts(
            model,
            file,
            parts,
            state,
            batch_size=batch_size,
            prompt=prompt,
            show_progress_bar=show_progress_bar,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            _merge(source, parts, num_parts, output)
    state.wait_for_everyone()
    return FileScores(pyarrow.parquet.read_metadata(output).num_rows, scored, truncated)


def _score_parts(
    model: CrossEncoder,
    file: PairFile,
    parts: Path,
    state: PartialState,
    *,
    batch_size: int | None,
    prompt: str | None,
    show_progress_bar: bool,
) -> tuple[int, int, int]:
    """Write this process's parts; returns pairs scored, pairs truncated, and the file's parts."""
    shares, mine = state.num_processes, state.process_index
    scored = truncated = num_parts = 0

    def wanted(index: int) -> bool:
        nonlocal num_parts
        num_parts = max(num_parts, index + 1)  # every process is asked for every part
        return index % shares == mine and not _part(parts, index).exists()

    # The next part is read and tokenised while one is scored.
    ready = ahead((block, *_tokenized(model, file, block, prompt)) for block in file.blocks(wanted))
    with closing(ready), tqdm(unit="rows", disable=not show_progress_bar) as bar:
        for block, tokens, cut in ready:
            scores = model.score_tokens(tokens, batch_size=batch_size).float().cpu().numpy()
            table = _with_scores(block, scores)
            _write(
                _part(parts, block.index),
                lambda writer, table=table: writer.write_table(table),
                table.schema,
            )
            scored, truncated = scored + len(scores), truncated + cut
            bar.update(table.num_rows)
    return scored, truncated, num_parts


def _run_id(model: CrossEncoder, file: PairFile, prompt: str | None) -> dict[str, Any]:
    """What must be the same for finished parts to be of use."""
    directory = Path(model.name_or_path)
    weights = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    return {
        "source": _version(file.path),
        "model": [model.name_or_path, *map(_version, weights)],
        "dtype": model.dtype_name,
        "max_length": model.max_length,
        "activation_fn": repr(model.activation_fn),
        "columns": dict(file.columns),
        "keep": list(file.keep),
        "rows_per_part": file.rows_per_block,
        "prompt": prompt,
    }


def _version(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _check_output(source: Path, output: Path) -> None:
    if output.suffix != ".parquet":
        raise ValueError(f"the output is a .parquet file, got {output}")
    if output.resolve() == source.resolve():
        raise ValueError(f"output {output} is the input: expected another file")
    if not output.parent.is_dir():
        raise ValueError(f"output {output}: directory {output.parent} does not exist")


def _prepare(output: Path, parts: Path, run_id: dict[str, Any], overwrite: bool) -> None:
    note = parts / "run.json"
    # Killed after the output was there: it is made again of its parts.
    merged = output.exists() and note.exists()
    if output.exists() and not merged and not overwrite:
        raise ValueError(
            f"{output} already exists; pass overwrite=True (--overwrite) to replace it"
        )
    if parts.exists():
        # Of a run that was killed before it wrote its note, or that finished no part, there is
        # nothing to lose.
        begun = note.exists() and any(parts.glob("[0-9]*.parquet"))
        before = _read_note(note) if begun else None
        changed = [
            name for name in run_id if before is not None and before.get(name) != run_id[name]
        ]
        if before == run_id:
            return
        if changed and not overwrite:
            raise ValueError(
                f"{parts} holds parts of a run with another {', '.join(changed)}; repeat that run "
                "to go on, or pass overwrite=True (--overwrite) to drop them"
            )
        shutil.rmtree(parts)
    with writing(parts):
        parts.mkdir()
        note.write_text(json.dumps(run_id, indent=2), encoding="utf-8")


def _read_note(note: Path) -> dict[str, Any]:
    """The arguments of the run that wrote the parts; of a damaged note none, which no run agrees
    with.
    """
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _part(parts: Path, index: int) -> Path:
    return parts / f"{index:09d}.parquet"


def _tokenized(
    model: CrossEncoder, file: PairFile, block: PairBlock, prompt: str | None
) -> tuple[TokenizedPairs, int]:
    try:
        return model.tokenize_counting(block.pairs, prompt=prompt)
    except ValueError as error:
        raise ValueError(
            f"{file.path}, part {block.index} of {file.rows_per_block} rows: {error}"
        ) from error


def _with_scores(block: PairBlock, scores: np.ndarray) -> pyarrow.Table:
    kept = {name: block.kept.column(name) for name in block.kept.column_names}
    if block.sizes is None:
        return pyarrow.table({**kept, "score": pyarrow.array(scores, pyarrow.float32())})
    offsets = np.concatenate([[0], np.cumsum(block.sizes)]).astype(np.int32)
    return pyarrow.table(
        {**kept, "scores": pyarrow.ListArray.from_arrays(offsets, pyarrow.array(scores))}
    )


def _write(path: Path, fill: Any, schema: pyarrow.Schema) -> None:
    """A Parquet file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with writing(path):
            with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
                fill(writer)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # of a full disk


def _merge(source: Path, parts: Path, num_parts: int, output: Path) -> None:
    if not num_parts:
        raise ValueError(f"{source} holds no pair")
    files = [_part(parts, index) for index in range(num_parts)]
    for file in files:
        with _whole(file, num_parts):
            pyarrow.parquet.read_metadata(file)
    names = pyarrow.parquet.read_schema(files[0]).names
    schema = pyarrow.schema([(name, _common_type(files, name)) for name in names])

    def fill(writer: pyarrow.parquet.ParquetWriter) -> None:
        for file in files:
            table = _read(file, num_parts)
            columns = [_converted(table.column(name), schema.field(name).type) for name in names]
            writer.write_table(pyarrow.table(columns, schema=schema))

    _write(output, fill, schema)
    shutil.rmtree(parts)


@contextmanager
def _whole(part: Path, num_parts: int) -> Iterator[None]:
    """Inside, a part is read."""
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{part}, one of {num_parts} parts, is missing or damaged: {one_line(error)}; remove "
            "it where it is there, and start again: the other parts stay"
        ) from error


def _read(part: Path, num_parts: int, columns: list[str] | None = None) -> pyarrow.Table:
    with _whole(part, num_parts):
        return pyarrow.parquet.read_table(part, columns=columns, partitioning=None)


def _common_type(files: Sequence[Path], name: str) -> pyarrow.DataType:
    """Of a column in all parts; text where values of several kinds were kept from JSON, as numbers
    and strings.
    """
    types = {pyarrow.parquet.read_schema(file).field(name).type for file in files}
    if len(types) == 1:
        return types.pop()
    try:
        schemas = [pyarrow.schema([(name, one)]) for one in types]
        common = pyarrow.unify_schemas(schemas, promote_options="permissive").field(name).type
        for file in files:  # a whole number may be too large for a double
            _read(file, len(files), [name]).column(name).cast(common)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
        logger.warning(
            "The kept column %s holds values of several kinds: it is written as text.", name
        )
        return pyarrow.string()
    return common


def _converted(column: pyarrow.ChunkedArray, kind: pyarrow.DataType) -> pyarrow.ChunkedArray:
    if pyarrow.types.is_string(kind) and column.type not in (kind, pyarrow.null()):
        return pyarrow.chunked_array([as_text(column.to_pylist())])
    return column.cast(kind)

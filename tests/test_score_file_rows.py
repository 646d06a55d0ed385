"""rerank-fast score: rows of two kinds, what is not Unicode, full disks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from rerank_fast import CrossEncoder
from rerank_fast.cli import main
from rerank_fast.score_file import score_file
from tests.full_disk import files_up_to
from tests.model_factory import make_tiny_bert
from tests.test_score_file import ROWS, column, command, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> CrossEncoder:
    return CrossEncoder(directory, device="cpu")


@pytest.mark.parametrize("first", ["document", "docs"])
@pytest.mark.parametrize("line", [2, 3, 7])
def test_a_file_is_of_pairs_or_of_lists(model: CrossEncoder, tmp_path: Path, first: str, line: int):
    """Of whichever kind its first row is, in all of its parts."""
    kinds = {"document": {"query": "a", "document": "b"}, "docs": {"query": "a", "docs": ["b"]}}
    rows = [kinds[first]] * 8
    rows[line - 1] = kinds["docs" if first == "document" else "document"]
    source, output = write(tmp_path / "pairs.jsonl", rows), tmp_path / "scores.parquet"
    message = f"pairs.jsonl, line {line}: no column {first}, which the file's first row has"
    for _ in range(2):  # the second time finished parts are not read again
        with pytest.raises(ValueError, match=message):
            score_file(model, source, output, rows_per_part=2)
        assert len(list(tmp_path.glob("scores.parquet.parts/0*.parquet"))) == (line - 1) // 2


@pytest.mark.parametrize(
    "value",
    ["\ud800", ["a", "\ud800"], {"a": "\ud800"}, {"\ud800": "a"}, 3],
    ids=["text", "list", "value", "key", "mixed"],
)
def test_a_kept_value_that_is_not_unicode_is_named(
    model: CrossEncoder, tmp_path: Path, value: object
):
    rows = [{"query": "a", "document": "b", "id": value if n == 5 else None} for n in range(8)]
    if value == 3:
        rows[4]["id"], rows[5]["id"] = 3, "\udfff"
    source = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 6, field id: not valid Unicode"):
        score_file(model, source, tmp_path / "scores.parquet", keep=["id"])


def test_names_and_prompts_that_are_not_unicode(model: CrossEncoder, tmp_path: Path):
    source = write(tmp_path / "pairs.jsonl", ROWS)
    for options, name in (({"keep": ["\udcff"]}, "keep"), ({"prompt": "\udcff"}, "prompt")):
        with pytest.raises(ValueError, match=f"{name}: not valid Unicode"):
            score_file(model, source, tmp_path / "scores.parquet", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize("full_at", ["part", "merge"])
def test_a_full_disk_is_one_line_and_what_is_done_stays(
    directory: Path, model: CrossEncoder, tmp_path: Path, capsys, full_at: str
):
    """A part is too large for what is left, or all of them together are."""
    rows = [{**row, "note": os.urandom(500 if full_at == "merge" else 1).hex()} for row in ROWS]
    if full_at == "part":
        rows[45]["note"] = os.urandom(50_000).hex()
    source, output = write(tmp_path / "pairs.jsonl", rows), tmp_path / "scores.parquet"
    arguments = command(directory, source, output, "--keep", "note", "--rows_per_part", "10")
    with files_up_to(25_000):
        assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    name = "000000004.parquet" if full_at == "part" else "scores.parquet"
    assert re.fullmatch(rf"rerank-fast score: error: can't write \S*{name}: .*large", error), error
    done = sorted(path.name for path in tmp_path.glob("scores.parquet.parts/*.parquet"))
    assert done == [f"{n:09d}.parquet" for n in range(4 if full_at == "part" else 5)]
    assert not list(tmp_path.rglob(".*unfinished"))
    assert not output.exists()
    result = score_file(model, source, output, keep=["note"], rows_per_part=10)
    assert result.scored == (10 if full_at == "part" else 0)
    expected = model.predict([(row["query"], row["document"]) for row in ROWS])
    np.testing.assert_allclose(column(output), expected, rtol=1e-5, atol=1e-6)

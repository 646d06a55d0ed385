"""rerank-fast score: files, kills, shards and malformed rows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rerank_fast import CrossEncoder
from rerank_fast import score_file as score_module
from rerank_fast.cli import main
from rerank_fast.score_file import score_file
from tests.model_factory import make_tiny_bert

WORDS = ["panda", "bear", "fish", "rain", "wind", "sea", "sun", "paris", "berlin", "city"]
ROWS = [
    {"id": f"r{n}", "query": WORDS[n % 10], "document": " ".join(WORDS[: 1 + n % 7]) + f" {n}"}
    for n in range(50)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> CrossEncoder:
    return CrossEncoder(directory, device="cpu")


@pytest.fixture(scope="module")
def expected(model: CrossEncoder) -> np.ndarray:
    return model.predict([(row["query"], row["document"]) for row in ROWS])


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=17)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def column(path: Path, name: str = "score") -> list:
    return pyarrow.parquet.read_table(path).column(name).to_pylist()


def assert_same(actual: Path, expected: Path) -> None:
    """The same rows in the same order; a score may differ in its last bit from one process to the
    next.
    """
    tables = pyarrow.parquet.read_table(actual), pyarrow.parquet.read_table(expected)
    assert tables[0].schema == tables[1].schema
    assert tables[0].drop(["score"]).equals(tables[1].drop(["score"]))
    np.testing.assert_allclose(tables[0]["score"], tables[1]["score"], rtol=1e-6)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("rows_per_part", [1, 7, 50, 4096])
def test_scores_are_those_of_predict_in_order(
    model: CrossEncoder, expected: np.ndarray, tmp_path: Path, suffix: str, rows_per_part: int
):
    source, output = write(tmp_path / f"pairs.{suffix}", ROWS), tmp_path / "scores.parquet"
    result = score_file(model, source, output, keep=["id"], rows_per_part=rows_per_part)
    assert (result.rows, result.scored, result.truncated) == (50, 50, 0)
    np.testing.assert_allclose(column(output), expected, rtol=1e-5, atol=1e-6)
    assert column(output, "id") == [row["id"] for row in ROWS]
    assert pyarrow.parquet.read_schema(output).names == ["id", "score"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, "scores.parquet"]


def test_a_kill_between_the_output_and_the_removal_of_its_parts(model, tmp_path: Path, monkeypatch):
    source, output = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "scores.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(
            "rerank_fast.score_file.shutil.rmtree",
            lambda path: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            score_file(model, source, output, rows_per_part=20)
    before = column(output)
    assert score_file(model, source, output, rows_per_part=20).scored == 0
    assert column(output) == before
    assert not (tmp_path / "scores.parquet.parts").exists()


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([0, 1, "x2", "x3"], ["0", "1", "x2", "x3"]),  # of two kinds in two parts
        (["a", 1, "b", "c"], ["a", "1", "b", "c"]),  # in one part
        ([True, False, 1.5, None], ["true", "false", "1.5", None]),
        ([{"n": 1}, {"n": 2}, [3], [4]], ['{"n": 1}', '{"n": 2}', "[3]", "[4]"]),
        ([2**53 + 1, 1, 0.5, 1.5], [str(2**53 + 1), "1", "0.5", "1.5"]),  # which no double holds
        ([2**70, 1, 2, 3], [str(2**70), "1", "2", "3"]),
        ([1, 2, 0.5, None], [1.0, 2.0, 0.5, None]),
        ([None, None, "a", "b"], [None, None, "a", "b"]),
    ],
)
def test_a_kept_column_of_several_kinds_is_text(
    model: CrossEncoder, tmp_path: Path, ids: list, kept: list
):
    rows = [{"query": "rain", "document": "sea", "id": one} for one in ids]
    source, output = write(tmp_path / "pairs.jsonl", rows), tmp_path / "scores.parquet"
    score_file(model, source, output, keep=["id"], rows_per_part=2)
    assert column(output, "id") == kept


def test_the_input_is_not_written_over(model: CrossEncoder, tmp_path: Path):
    source = write(tmp_path / "pairs.parquet", ROWS)
    with pytest.raises(ValueError, match="is the input: expected another file"):
        score_file(model, source, tmp_path / "." / "pairs.parquet", overwrite=True)
    assert pyarrow.parquet.read_table(source).num_rows == len(ROWS)


def test_a_run_that_finished_no_part_is_in_nobodys_way(model: CrossEncoder, tmp_path: Path):
    source, output = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "scores.parquet"
    with pytest.raises(ValueError, match="nope"):
        score_file(model, source, output, keep=["nope"])
    assert score_file(model, source, output, keep=["id"]).scored == len(ROWS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_and_other_names(model: CrossEncoder, tmp_path: Path, suffix: str):
    rows = [
        {"q": "rain", "passages": ["sea", "wind"]},
        {"q": "sun", "passages": []},
        {"q": "sea", "passages": ["a"]},
    ]
    source, output = write(tmp_path / f"lists.{suffix}", rows), tmp_path / "scores.parquet"
    score_file(model, source, output, columns={"query": "q", "docs": "passages"}, rows_per_part=2)
    expected = model.predict([("rain", "sea"), ("rain", "wind"), ("sea", "a")])
    lists = column(output, "scores")
    assert [len(scores) for scores in lists] == [2, 0, 1]
    np.testing.assert_allclose(np.concatenate(lists), expected, rtol=1e-5)


def test_blank_lines_and_a_byte_order_mark(
    model: CrossEncoder, expected: np.ndarray, tmp_path: Path
):
    text = "\ufeff\n" + "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    score_file(model, tmp_path / "pairs.jsonl", tmp_path / "scores.parquet", rows_per_part=9)
    np.testing.assert_allclose(column(tmp_path / "scores.parquet"), expected, rtol=1e-5, atol=1e-6)


def test_kept_columns_may_change_their_numbers_kind(model: CrossEncoder, tmp_path: Path):
    rows = [{"query": "a", "document": "b", "n": value} for value in (1, 2, 0.5, None)]
    source = write(tmp_path / "pairs.jsonl", rows)
    score_file(model, source, tmp_path / "scores.parquet", keep=["n"], rows_per_part=2)
    assert column(tmp_path / "scores.parquet", "n") == [1.0, 2.0, 0.5, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"pairs\.jsonl, line 32: not a JSON object"),
        ("3", r"line 32: expected a JSON object, got int 3"),
        (
            '{"query": "a"}',
            r"line 32: no column document, which the file's first row has, a pair; there are query",
        ),
        (
            '{"query": "a", "document": null}',
            r"line 32, field document: expected a string, got NoneType None",
        ),
        ('{"query": ["a"], "document": "b"}', r"line 32, field query: expected a string, got list"),
        ('{"query": "a", "document": "\\ud800"}', r"line 32, field document: not valid Unicode"),
    ],
)
def test_a_malformed_line_is_named_and_what_is_done_stays(
    model: CrossEncoder, expected: np.ndarray, tmp_path: Path, monkeypatch, line: str, message: str
):
    source, output = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "scores.parquet"
    lines = source.read_text().splitlines()
    good = lines[31]
    lines[31] = line
    source.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        score_file(model, source, output, rows_per_part=10)
    assert not output.exists()
    assert len(list(output.with_name("scores.parquet.parts").glob("0*.parquet"))) == 3
    lines[31] = good
    source.write_text("\n".join(lines))
    note = output.with_name("scores.parquet.parts") / "run.json"
    kept = note.read_text()
    for damaged in ("", "[]", "{}"):
        note.write_text(damaged)
        with pytest.raises(ValueError, match="parts of a run with another source, model"):
            score_file(model, source, output, rows_per_part=10)
    note.write_text(kept)
    with pytest.raises(
        ValueError, match="parts of a run with another source;"
    ):  # the file was changed
        score_file(model, source, output, rows_per_part=10)
    assert score_file(model, source, output, rows_per_part=10, overwrite=True).scored == 50
    np.testing.assert_allclose(column(output), expected, rtol=1e-5, atol=1e-6)


def test_a_malformed_parquet_row_is_named(model: CrossEncoder, tmp_path: Path):
    rows = [dict(row) for row in ROWS]
    rows[37]["document"] = None
    source = write(tmp_path / "pairs.parquet", rows)
    with pytest.raises(
        ValueError, match=r"pairs\.parquet, row 37, field document: expected a string, got NoneType"
    ):
        score_file(model, source, tmp_path / "scores.parquet", rows_per_part=5)


def test_arguments_and_files_that_are_wrong(model: CrossEncoder, tmp_path: Path):
    source, output = write(tmp_path / "pairs.jsonl", ROWS[:2]), tmp_path / "scores.parquet"
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "empty.jsonl").write_text("\n")
    for arguments, options, message in (
        ((tmp_path / "none.jsonl", output), {}, "none.jsonl does not exist"),
        ((tmp_path / "pairs.txt", output), {}, "expected a .jsonl, .json, .csv"),
        ((tmp_path / "broken.parquet", output), {}, "is not a Parquet file"),
        ((tmp_path / "empty.jsonl", output), {}, "empty.jsonl holds no pair"),
        ((source, tmp_path / "scores.csv"), {}, "the output is a .parquet file"),
        ((source, tmp_path / "none" / "scores.parquet"), {}, "none does not exist"),
        ((source, output), {"columns": {"text": "a"}}, "got the key 'text'"),
        (
            (source, output),
            {"columns": {"document": "text"}},
            "line 1: no column text; there are document, id, query",
        ),
        ((source, output), {"keep": ["rank"]}, "no column rank"),
        ((source, output), {"keep": ["score"]}, "keep can't hold score"),
        ((source, output), {"rows_per_part": 0}, "rows_per_part must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            score_file(model, *arguments, **{"overwrite": True, **options})
    score_file(model, source, output, overwrite=True)
    with pytest.raises(ValueError, match="already exists"):
        score_file(model, source, output)


def command(directory: Path, source: Path, output: Path, *more: str) -> list[str]:
    arguments = [
        "score",
        "--model",
        str(directory),
        "--input",
        str(source),
        "--output",
        str(output),
    ]
    return [*arguments, "--rows_per_part", "2", *more]


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


SLOWED = """
import sys, time
from rerank_fast import score_file as score_module
from rerank_fast.cli import main
from rerank_fast.model.cross_encoder import CrossEncoder
score = CrossEncoder.score_tokens
def slowed(*a, **k):
    time.sleep(0.2)
    return score(*a, **k)
CrossEncoder.score_tokens = slowed
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_and_gives_the_same_file(directory: Path, tmp_path: Path, capsys):
    source = write(tmp_path / "pairs.jsonl", ROWS)
    keep = ("--keep", "id")
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    assert main(command(directory, source, whole, *keep)) == 0
    parts = tmp_path / "resumed.parquet.parts"
    run = [sys.executable, "-c", SLOWED, *command(directory, source, resumed, *keep)]
    process = subprocess.Popen(run, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while len(list(parts.glob("0*.parquet"))) < 4:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not resumed.exists()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("0*.parquet")}
    assert 4 <= len(done) < 25
    capsys.readouterr()
    assert main(command(directory, source, resumed, *keep)) == 0
    assert f"{50 - 2 * len(done)} pairs scored now" in capsys.readouterr().out
    assert_same(resumed, whole)
    assert not parts.exists()


def test_a_second_run_on_the_same_output_is_refused_and_the_first_one_is_whole(
    directory: Path, tmp_path: Path, capsys
):
    source, output = write(tmp_path / "pairs.jsonl", ROWS), tmp_path / "scores.parquet"
    run = [sys.executable, "-c", SLOWED, *command(directory, source, output)]
    process = subprocess.Popen(run, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("scores.parquet.parts/0*.parquet")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for more in ((), ("--overwrite",)):
        assert main(command(directory, source, output, *more)) == 2
        assert (
            f"scores.parquet is being written by process {process.pid} on "
            in capsys.readouterr().err
        )
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert len(column(output)) == len(ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.jsonl", "scores.parquet"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_parts_are_merged_only_if_all_are_whole(
    model: CrossEncoder, tmp_path: Path, monkeypatch, suffix: str, index: int, damage: Callable
):
    source, output = write(tmp_path / f"pairs.{suffix}", ROWS), tmp_path / "scores.parquet"
    part, merge = tmp_path / "scores.parquet.parts" / f"{index:09d}.parquet", score_module._merge
    with monkeypatch.context() as patched:
        patched.setattr(score_module, "_merge", lambda *all: (damage(part), merge(*all)))
        message = rf"{index:09d}\.parquet, one of \d+ parts, is missing or damaged"
        with pytest.raises(ValueError, match=message):
            score_file(model, source, output, rows_per_part=7)
    assert not output.exists()
    part.unlink(missing_ok=True)
    assert score_file(model, source, output, rows_per_part=7).rows == len(ROWS)


def test_two_processes_give_what_one_gives(directory: Path, tmp_path: Path):
    source = write(tmp_path / "pairs.parquet", ROWS)
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert main(command(directory, source, one, "--keep", "id")) == 0
    # What accelerate launch calls; on a machine without GPUs it starts one process itself.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    run = [*launch, "-m", "rerank_fast", *command(directory, source, two, "--keep", "id")]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("50 rows in") == 1
    scored = int(done.stdout.split(";")[1].split()[0])
    assert 0 < scored < 50  # the other process scored the rest
    assert_same(two, one)


def test_the_command_counts_what_it_truncated_once(directory: Path, tmp_path: Path, caplog):
    source = write(
        tmp_path / "pairs.jsonl",
        [{"query": "a", "document": "the sea " * n} for n in (1, 60, 1, 60, 1)],
    )
    assert main(command(directory, source, tmp_path / "scores.parquet", "--dtype", "int8")) == 0
    assert [record.message for record in caplog.records if "truncated" in record.message] == [
        "2 of 5 pairs are longer than max_length=64 tokens and were truncated; this is said once, "
        "and the model's truncated_pairs counts on."
    ]
    assert main(command(directory, tmp_path / "none.jsonl", tmp_path / "other.parquet")) == 2

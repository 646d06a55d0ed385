"""The tables of the documents are what benchmarks/results/ holds, and nothing is lost by adding."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.results import Column, Row, Run, quantity
from benchmarks.steps.training_memory import MODES, PEER, compared
from benchmarks.timing import Interleaved
from benchmarks.tools import report


def make_run(date: str, *rows: Row, own: str = "avx2", widest: str = "avx2") -> Run:
    return Run(
        date, f"pytest of {date}", "a processor", widest, own, {}, 2, {"torch": "2"}, [*rows]
    )


def row(case: str, ours: float = 1.0, peer: float | None = 2.0, unit: str = "s") -> Row:
    return Row("steps/one", case, peer, ours, unit)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_a_page_holds_what_the_data_say(page: Path):
    text = page.read_text(encoding="utf-8")
    assert report.rendered(text, results.columns()) == text, (
        "run: python -m benchmarks report --add"
    )


def test_every_table_is_on_the_page():
    text = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    named = set(re.findall(r"<!-- table: (\S+) -->", text)) - {"gains"}
    kept = {one.table for column in results.columns() for run in column.runs for one in run.rows}
    assert kept <= named
    folder = Path(report.__file__).parents[1]
    for name in named:  # each is the name of the benchmark that makes it
        room, file = name.split("/")
        assert any((folder / room / f"{start}{file}.py").is_file() for start in ("", "test_")), name


def test_what_is_kept_says_where_it_was_measured():
    for column in results.columns():
        for run in column.runs:
            assert run.column == column.name
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", run.date)
            assert run.processor
            assert run.command
            assert run.versions["torch"]
            assert all(one.ours > 0 and (one.peer is None or one.peer > 0) for one in run.rows)


def test_a_new_run_renews_its_own_cases_alone(tmp_path: Path):
    column = Column(
        "avx2", [make_run("2026-01-01", row("a"), row("b")), make_run("2026-01-02", row("c"))]
    )
    column.add(make_run("2026-02-01", row("a", ours=0.5), row("c"), row("d")))
    column.write(tmp_path)
    Column("amx_bf16", [make_run("2026-01-01", row("a"), own="amx_bf16")]).write(tmp_path)
    kept = results.columns(tmp_path)
    assert [one.name for one in kept] == ["amx_bf16", "avx2"]
    found = kept[1].rows("steps/one")
    dates = {case: run.date for case, (run, _) in found.items()}
    assert dates == {"b": "2026-01-01", "a": "2026-02-01", "c": "2026-02-01", "d": "2026-02-01"}
    assert found["a"][1].gain == 4.0


def test_a_table_has_a_column_a_set_and_names_its_runs():
    stands_in = make_run("2026-01-02", row("a", ours=4, peer=None), widest="amx_bf16")
    assert stands_in.column == "avx2-on-amx_bf16"
    kept = [
        Column("avx2", [make_run("2026-01-01", row("a"), row("rate", 58, 29, "pairs/s"))]),
        Column(stands_in.column, [stands_in]),
    ]
    table = report.table("steps/one", kept)
    assert "1.00\u00a0s" in table  # a figure is not parted from its unit
    head, _, first, second, _, *runs = table.replace("\u00a0", " ").splitlines()
    assert head == "| peer → ours | AVX2 | AVX2, stood in for by AMX |"
    assert first == "| a | **2.0x** 2.00 s → 1.00 s [1] | can't → 4.00 s [2] |"
    assert second == "| rate | **2.0x** 29.0 pairs/s → 58.0 pairs/s [1] |  |"
    assert [line[:18] for line in runs] == ["1. AVX2. 2026-01-0", "2. AVX2, stood in "]
    assert "pytest of 2026-01-02" in runs[1]
    assert report.table("steps/none", kept) == "Not measured yet.\n"


def test_the_gains_take_a_machine_of_its_own_before_one_that_stands_in():
    case = Row("steps/memory", "peak memory of a step", 3.0, 1.0, "B")
    other = Row("steps/memory", "peak memory of a step, drop-in", 9.0, 1.0, "B")
    stands_in = Column("avx2-on-amx_bf16", [make_run("2026-01-01", case, other, widest="amx_bf16")])
    own = dataclasses.replace(case, peer=2.0)
    assert "| peak memory of that step | 3.0x less* |" in report.gains([stands_in])
    text = report.gains([Column("avx2", [make_run("2026-01-02", own)]), stands_in])
    assert "| peak memory of that step | 2.0x less |" in text
    assert "stood in" not in text


def test_families_have_a_row_a_size_and_a_table_a_set():
    rows = [
        Row("steps/families", "BERT, tiny: step", 500.0, 2000.0, "tokens/s", "9 pairs; by 1024"),
        Row("steps/families", "BERT, tiny: step, peak", 2.0**23, 2.0**22, "B"),
        Row("steps/families", "T5 (monoT5), base: predict", 5.0, 10.0, "tokens/s", "2 pairs; x; y"),
    ]
    kept = [Column("amx_bf16", [make_run("2026-01-01", row("a"))])]
    assert report.families(kept) == "Not measured yet.\n"
    kept += [Column("avx2", [make_run("2026-01-02", *rows)])]
    heading, _, head, _, first, second, _, pairs, _, run, *_ = report.families(kept).splitlines()
    assert heading == "AVX2:"
    assert head.startswith("| padded → packed | step, tokens/s | its peak |")
    cells = "| BERT, tiny [1] | **4.0x** 500 → 2,000 | **2.0x** 8.00 MiB → 4.00 MiB |  |  |"
    assert first.replace("\u00a0", " ") == cells
    assert second == "| T5 (monoT5), base [1] |  |  | **2.0x** 5.00 → 10.0, y |  |"
    assert pairs == "tiny, step: 9 pairs; base, predict: 2 pairs."
    assert run.startswith("1. 2026-01-02: a processor")


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (12.2, "s", "12.2 s"),
        (0.67, "s", "670 ms"),
        (4.97e-5, "s", "49.7 µs"),
        (1444 * 2**20, "B", "1,444 MiB"),
        (58.0, "pairs/s", "58.0 pairs/s"),
    ],
)
def test_quantities(value: float, unit: str, said: str):
    assert quantity(value, unit) == said


def test_calls_are_timed_in_turn():
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in ("ours", "peer")}
    timed = Interleaved(calls, repeats=2)
    timed.warm_up({"peer": lambda: made.append("small")})
    medians = timed.run(2)
    assert made == ["ours", "small", *["ours", "ours", "peer", "peer"] * 2]
    assert list(map(len, timed.seconds.values())) == [2, 2]
    assert all(seconds > 0 for seconds in medians.values())


def test_memory_rows_are_named_as_those_that_are_kept():
    """A new run renews them only if its cases have their names."""

    def case(mode: str, lists: int, documents: int, **settings: str) -> dict:
        return {"mode": mode, "lists": lists, "documents": documents, "settings": settings}

    value = {"mib": 2.0, "seconds": 4.0}
    found = [(case(mode, 16, 12), value) for mode in (*MODES, PEER, f"{PEER}, checkpointing")]
    found += [(case(mode, 16, 128), value) for mode in (*MODES, f"{PEER}, checkpointing")]
    found += [(case(PEER, 16, 128), None)]
    found += [(case(mode, 1, 8), value) for mode in ("cached", "direct")]
    rows = {one.case: one for one in compared(found)}
    kept: dict[str, Any] = {}
    for column in results.columns():
        kept |= column.rows("steps/training_memory")
    assert len(rows) == 17
    assert rows.keys() <= kept.keys()
    assert all((one.peer is None) == (kept[name][1].peer is None) for name, one in rows.items())
    objectives = [
        (case("cached", 1, documents, objective=name), value)
        for name in ("lambda_loss", "mse")
        for documents in (8, 512)
    ]
    (one,) = compared(objectives)
    assert one.case == "1 list of 512, gradient_cache on, mse, peer lambda_loss"
    assert one.case in kept


@pytest.mark.parametrize(
    ("vendor", "family", "model", "said"),
    [
        ("AuthenticAMD", 25, 0x11, "AMD EPYC (Zen 4)"),
        ("AuthenticAMD", 25, 0x01, "AMD EPYC (Zen 3)"),
        ("AuthenticAMD", 23, 0x01, "AMD EPYC (Zen 1)"),
        ("AuthenticAMD", 99, 0x01, "AMD EPYC"),
        ("GenuineIntel", 25, 0x11, "AMD EPYC"),
    ],
)
def test_a_processor_is_named_with_its_core(tmp_path, vendor, family, model, said):
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        "model name\t: AMD EPYC\nflags\t\t: fpu avx2\npower management:\n"
    )
    assert results.processor(tmp_path / "cpuinfo") == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [("fpu avx2", "Intel Xeon"), ("fpu avx512f amx_tile", "Intel Xeon with AMX")],
)
def test_an_intel_processor_is_named_with_its_tiles(tmp_path, flags, said):
    (tmp_path / "cpuinfo").write_text(
        f"vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: {flags}\n"
    )
    assert results.processor(tmp_path / "cpuinfo") == said


@pytest.mark.parametrize("rows", [["--rows", "a.json"], ["--rows=a.json"], []])
def test_a_command_is_kept_without_where_its_rows_went(rows):
    words = ["pytest", "benchmarks/", *rows, "-q", "-k", "loss or step"]
    assert results.command(*words) == "pytest benchmarks/ -k 'loss or step'"

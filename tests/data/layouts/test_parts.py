"""Sources of several parts: BEIR's folders, TREC's files, tables of ids, MS MARCO's files."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from rerank_fast.data import ListStream, load_lists
from rerank_fast.data.lists import names_of
from rerank_fast.data.mining.sources import load_collection
from rerank_fast.data.pairs import PairFile
from rerank_fast.evaluation.candidates import load_candidates
from tests.data.layouts.examples import Rows, lists_of, write_lines

CORPUS = {"d1": "bear of bamboo", "d2": "fish of seas", "d3": "sun and bear", "d4": "wind"}
TITLES = {"d1": "Panda", "d4": ""}
QUERIES = {"q1": "panda bear", "q2": "fish seas", "q3": "nothing here"}
QRELS = [("q1", "d1", 2), ("q1", "d4", 0), ("q2", "d2", 1), ("q3", "d4", 0)]
RUN = [
    ("q1", "d3", 9.5),
    ("q1", "d1", 7.25),
    ("q2", "d2", -1.0),
    ("q2", "d1", -2.0),
    ("q3", "d1", 0.0),
]
TEXTS = {key: f"{TITLES[key]} {text}" if TITLES.get(key) else text for key, text in CORPUS.items()}

JUDGED = [("q1", {"d3": 0, "d1": 2, "d4": 0}), ("q2", {"d2": 1, "d1": 0})]
SCORED = [("q1", {"d3": 9.5, "d1": 7.25}), ("q2", {"d2": -1, "d1": -2}), ("q3", {"d1": 0})]


def expected(lists: list[tuple[str, dict[str, float]]]) -> Rows:
    return lists_of(
        *((QUERIES[q], [TEXTS[d] for d in docs], list(docs.values())) for q, docs in lists)
    )


def beir(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"_id": key, "title": TITLES.get(key), "text": text} for key, text in CORPUS.items()]
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(
        folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in QUERIES.items()]
    )
    (folder / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{grade}" for q, d, grade in QRELS)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    return folder


def trec_run(path: Path) -> Path:
    path.write_text(
        "".join(f"{q} Q0 {d} {i} {score} bm25\n" for i, (q, d, score) in enumerate(RUN, 1))
    )
    return path


def trec_qrels(path: Path) -> Path:
    path.write_text("".join(f"{q} 0 {d} {grade}\n" for q, d, grade in QRELS))
    return path


def tsv(path: Path, texts: dict[str, str]) -> Path:
    content = "".join(f"{key}\t{text}\n" for key, text in texts.items()).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return beir(tmp_path / "beir")


def test_a_beir_folder_with_a_run(folder: Path, caplog: pytest.LogCaptureFixture):
    trec_run(folder / "run.trec")
    with caplog.at_level(logging.INFO, "rerank_fast.data"):
        assert load_lists(folder).to_list() == expected(JUDGED)
    assert (
        "read as judgements (corpus, queries, qrels, run); labels: the qrels' grades" in caplog.text
    )
    assert "1 of 3 judged queries have no relevant document: left out" in caplog.text
    assert load_lists(str(folder), labels="scores").to_list() == expected(SCORED)
    assert list(ListStream(folder)) == expected(JUDGED)
    assert [len(one.docs) for one in load_candidates(folder)] == [3, 2]


def test_a_beir_folder_without_a_run_asks_bm25(folder: Path, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("bm25s")
    with caplog.at_level(logging.INFO, "rerank_fast.data"):
        found = load_lists(folder).to_list()
    assert "BM25 finds up to 100 documents for each of 2 queries" in caplog.text
    # d4 shares no term with the query: it was judged.
    assert found == expected([("q1", {"d1": 2, "d3": 0, "d4": 0}), ("q2", {"d2": 1})])
    with pytest.raises(ValueError, match="labels is 'scores', but there are no scores"):
        load_lists(folder, labels="scores")


def test_the_split_of_a_folder(folder: Path):
    trec_run(folder / "run.trec")
    expected_test = expected([("q2", {"d2": 1, "d1": 0})])
    assert load_lists(f"{folder}[test]").to_list() == expected_test
    assert load_lists(folder, split="test").to_list() == expected_test
    with pytest.raises(
        ValueError, match=r"qrels has test\.tsv, train\.tsv, and nothing of the split 'dev'"
    ):
        load_lists(folder, split="dev")
    (folder / "qrels" / "train.tsv").unlink()
    with pytest.raises(ValueError, match=r"qrels has test\.tsv, and nothing of the split 'train'"):
        load_lists(folder)
    assert names_of(f"{folder}[test]") == [str(folder)]


def parts_of(kind: str, folder: Path) -> dict[str, Any]:
    """The same parts in other containers."""
    corpus = [
        {"docid": key, "title": TITLES.get(key), "text": text} for key, text in CORPUS.items()
    ]
    if kind == "trec":
        return {
            "corpus": tsv(folder / "collection.tsv.gz", TEXTS),
            "queries": tsv(folder / "queries.tsv", QUERIES),
            "qrels": trec_qrels(folder / "qrels.txt"),
            "run": trec_run(folder / "bm25.run"),
        }
    run = [{"qid": q, "pid": d, "score": score} for q, d, score in RUN]
    qrels = [{"query-id": q, "corpus-id": d, "score": grade} for q, d, grade in QRELS]
    queries = [{"qid": key, "query": text} for key, text in QUERIES.items()]
    if kind == "datasets":
        tables = map(datasets.Dataset.from_list, (corpus, queries, qrels, run))
    elif kind == "pandas":
        tables = map(pandas.DataFrame, (corpus, queries, qrels, run))
    else:
        names = ("c.jsonl", "q.jsonl", "r.jsonl", "s.jsonl")
        rows = (corpus, queries, qrels, run)
        tables = (
            str(write_lines(folder / name, part)) for name, part in zip(names, rows, strict=True)
        )
    return dict(zip(("corpus", "queries", "qrels", "run"), tables, strict=True))


@pytest.mark.parametrize("kind", ["trec", "datasets", "pandas", "jsonl"])
def test_a_mapping_of_parts(kind: str, tmp_path: Path):
    parts = parts_of(kind, tmp_path)
    assert load_lists(parts).to_list() == expected(JUDGED)
    assert load_lists(parts, labels="scores").to_list() == expected(SCORED)
    without = {name: part for name, part in parts.items() if name != "qrels"}
    assert load_lists(without).to_list() == expected(SCORED)
    assert [one.query for one in load_candidates(parts)] == [QUERIES["q1"], QUERIES["q2"]]
    with pytest.raises(ValueError, match="each part names its split"):
        load_lists(parts, split="test")


def test_rankings_as_a_run(tmp_path: Path):
    parts = parts_of("jsonl", tmp_path)
    parts["run"] = [
        {"query-id": "q1", "corpus-ids": ["d3", "d1"]},
        {"query-id": "q2", "corpus-ids": ["d2", "d1"]},
    ]
    assert load_lists(parts).to_list() == expected(JUDGED)
    (tmp_path / "run.tsv").write_text("q1\td3\t1\nq1\td1\t2\nq2\td2\t1\nq2\td1\t2\n")
    parts["run"] = tmp_path / "run.tsv"
    assert load_lists(parts).to_list() == expected(JUDGED)
    with pytest.raises(ValueError, match="query 'q1': the run has ranks and no scores"):
        load_lists(parts, labels="scores")


LISTS: dict[str, tuple[Any, Rows, list[list[float]] | None]] = {
    "triples": (
        [{"query_id": "q1", "positive_id": "d1", "negative_id": "d2"}],
        lists_of(("panda bear", [TEXTS["d1"], TEXTS["d2"]], [1, 0])),
        None,
    ),
    "numbered": (
        [
            {
                "qid": "q1",
                "pos_pid": "d1",
                "negative_id_1": "d2",
                "negative_id_2": "d4",
                "scores": [3, 2, 1],
            }
        ],
        lists_of(("panda bear", [TEXTS["d1"], TEXTS["d2"], TEXTS["d4"]], [1, 0, 0])),
        [[3, 2, 1]],
    ),
    "ids and scores": (
        [{"query_id": "q1", "document_ids": ["d3", "d1"], "scores": [0.5, -2]}],
        lists_of(("panda bear", [TEXTS["d3"], TEXTS["d1"]], [0.5, -2])),
        [[0.5, -2]],
    ),
    "a row a document": (
        [
            {"query-id": "q1", "corpus-id": key, "score": value}
            for key, value in (("d3", 1), ("d1", 7))
        ],
        lists_of(("panda bear", [TEXTS["d3"], TEXTS["d1"]], [1, 7])),
        [[1, 7]],
    ),
    "queries as texts": (
        [{"query": "own", "positive_document_ids": ["d1"], "negative_document_ids": ["d2", "d3"]}],
        lists_of(("own", [TEXTS["d1"], TEXTS["d2"], TEXTS["d3"]], [1, 0, 0])),
        None,
    ),
    "hard negatives": (
        [{"qid": "q1", "pos": ["d1"], "neg": {"bm25": ["d2", "d3"], "dense": ["d3", "d4"]}}],
        lists_of(("panda bear", [TEXTS[key] for key in ("d1", "d2", "d3", "d4")], [1, 0, 0, 0])),
        None,
    ),
    "hard negatives with scores": (
        [
            {
                "qid": "q1",
                "pos": [{"pid": "d1", "ce-score": 9.5}],
                "neg": {"bm25": [{"pid": "d2", "ce-score": -1}, {"pid": "d3", "ce-score": 4}]},
            }
        ],
        lists_of(("panda bear", [TEXTS["d1"], TEXTS["d2"], TEXTS["d3"]], [1, 0, 0])),
        [[9.5, -1, 4]],
    ),
}


@pytest.mark.parametrize("kind", ["rows", "jsonl", "datasets", "gz"])
@pytest.mark.parametrize("name", LISTS)
def test_tables_of_ids(name: str, kind: str, tmp_path: Path):
    rows, lists, scores = LISTS[name]
    parts = parts_of("trec", tmp_path)
    parts = {name: parts[name] for name in ("corpus", "queries")}
    if kind == "datasets":
        rows = datasets.Dataset.from_list(rows)
    elif kind == "jsonl":
        rows = write_lines(tmp_path / "lists.jsonl", rows)
    elif kind == "gz":
        rows = tmp_path / "hard-negatives.jsonl.gz"
        rows.write_bytes(gzip.compress("\n".join(map(json.dumps, LISTS[name][0])).encode()))
    assert load_lists(parts | {"lists": rows}).to_list() == lists
    assert list(ListStream(parts | {"lists": rows})) == lists
    if scores is None:
        with pytest.raises(ValueError, match="labels is 'scores', but"):
            load_lists(parts | {"lists": rows}, labels="scores")
    else:
        found = load_lists(parts | {"lists": rows}, labels="scores")
        assert found["labels"] == scores


def test_ms_marcos_triples(tmp_path: Path):
    """As they are published: tabs, quotes that stand alone, no header."""
    text = tmp_path / "triples.train.small.tsv"
    text.write_text(
        'what is "it"\t"Quoted passage one\ta passage two\nanother\tpassage one\tpassage "two\n'
    )
    assert load_lists(text).to_list() == lists_of(
        ('what is "it"', ['"Quoted passage one', "a passage two"], [1, 0]),
        ("another", ["passage one", 'passage "two'], [1, 0]),
    )
    scored = tmp_path / "scored.tsv"
    scored.write_text("9.5\t-2.25\ta query\tpassage one\tpassage two\n")
    assert load_lists(scored)["labels"] == [[1, 0]]
    assert load_lists(scored, labels="scores")["labels"] == [[9.5, -2.25]]
    folder = tmp_path / "msmarco"
    folder.mkdir()
    tsv(folder / "collection.tsv", {"10": 'the "first', "11": "second"})
    tsv(folder / "queries.train.tsv", {"7": "seven"})
    tsv(folder / "queries.dev.tsv", {"7": "another"})
    (folder / "qidpidtriples.train.full.tsv").write_text("7\t10\t11\n")
    assert load_lists(folder).to_list() == lists_of(("seven", ['the "first', "second"], [1, 0]))
    with pytest.raises(
        ValueError, match="no layout has the columns negative_id, positive_id, query_id"
    ):
        load_lists(folder / "qidpidtriples.train.full.tsv")
    headed = tmp_path / "words.tsv"
    headed.write_text("one\ttwo\tthree\na b\tc d\te f\n")
    with pytest.raises(ValueError, match="line 2: no layout has the columns one, three, two"):
        load_lists(headed)


def bad_run(parts: dict[str, Any], folder: Path) -> None:
    parts["run"].write_text("q1 Q0 d1 1 9.5 bm25\nq1 Q0 d1 1\n")


def bad_qrels(parts: dict[str, Any], folder: Path) -> None:
    parts["qrels"].write_text("q1 0 d1 1\nq1 0 d2 one\n")


def change(part: str, rows: Any) -> Callable[[dict[str, Any], Path], None]:
    def changed(parts: dict[str, Any], folder: Path) -> None:
        parts[part] = write_lines(folder / "bad.jsonl", rows)

    return changed


BAD: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "run": (bad_run, r"bm25\.run, line 2: expected query_id iteration corpus_id rank score tag"),
    "grade": (bad_qrels, r"qrels\.txt, line 2, field score: expected a finite float32, got 'one'"),
    "text": (
        change("corpus", [{"_id": "d1", "text": 3}]),
        r"bad\.jsonl, line 1, text: expected a string",
    ),
    "title": (
        change("corpus", [{"_id": "d1", "text": "a", "title": 3}]),
        r"bad\.jsonl, line 1, title: expected",
    ),
    "id": (
        change("corpus", [{"_id": 1.5, "text": "a"}]),
        r"bad\.jsonl, line 1, field _id: expected a string or an",
    ),
    "no id": (change("corpus", [{"text": "a"}]), r"bad\.jsonl, line 1: no column for an id"),
    "no text": (change("queries", [{"_id": "a"}]), r"bad\.jsonl, line 1: no column for a text"),
    "no row": (
        change("queries", [3]),
        r"bad\.jsonl, line 1: expected an object with an id and a text",
    ),
    "no rows": (change("queries", []), r"bad\.jsonl holds no text"),
    "twice": (
        change("corpus", [{"_id": "a", "text": "a"}, {"_id": "a", "text": "b"}]),
        r"bad\.jsonl, line 2: the id 'a' stands for two texts",
    ),
    "query": (change("queries", [{"_id": "q1", "text": "a"}]), "queries has no 'q2'"),
    "empty": (
        change("queries", [{"_id": key, "text": " "} for key in QUERIES]),
        "query 'q1': the string is empty",
    ),
    "document": (
        change("corpus", [{"_id": "d1", "text": "a"}]),
        "query 'q1': the corpus has no 'd3'",
    ),
    "score": (
        change("run", [{"query_id": "q1", "corpus_ids": ["d1"], "scores": [1, 2]}]),
        r"bad\.jsonl, line 1, field scores: 2 numbers for 1 documents",
    ),
    "no query": (
        change("run", [{"corpus_id": "d1"}]),
        r"bad\.jsonl, line 1: no column for the query's id",
    ),
    "no document": (
        change("qrels", [{"query_id": "q1"}]),
        r"bad\.jsonl, line 1: no column for the document's",
    ),
    "missing id": (
        change("lists", [{"query_id": "q1", "positive_id": "d1", "negative_id": "d9"}]),
        r"bad\.jsonl, line 1, field negative_id: corpus has no 'd9'",
    ),
    "no such query": (
        change("lists", [{"query_id": "q9", "positive_id": "d1", "negative_id": "d2"}]),
        r"bad\.jsonl, line 1, field query_id: queries has no 'q9'",
    ),
    "hard negative": (
        change("lists", [{"qid": "q1", "pos": ["d1"], "neg": {"bm25": ["d2", "d9"]}}]),
        r"bad\.jsonl, line 1, field neg\.bm25\[1\]: corpus has no 'd9'",
    ),
    "no list": (
        change("lists", [{"qid": "q1", "pos": ["d1"], "neg": {"bm25": "d2"}}]),
        r"bad\.jsonl, line 1, field neg\.bm25: expected a list of ids",
    ),
    "no pid": (
        change("lists", [{"qid": "q1", "pos": [{"ce-score": 1}], "neg": []}]),
        r"bad\.jsonl, line 1, field pos\[0\]: no column for the document's id",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_part_is_named(name: str, tmp_path: Path):
    parts = parts_of("trec", tmp_path)
    spoil, message = BAD[name]
    spoil(parts, tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load_lists(parts)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"corpus": CORPUS}, "no layout has the parts corpus alone; known are lists"),
        (
            {"queries": "a", "texts": "b"},
            "expected a path, a dataset, a table, a sequence of rows or a mapping",
        ),
        ({}, "expected a path"),
    ],
)
def test_parts_that_do_not_belong_together(parts: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_lists(parts)


def test_a_beir_folder_is_mined(folder: Path):
    found = load_collection(folder)
    assert found.queries == ["panda bear", "fish seas"]
    assert set(found.corpus) == set(TEXTS.values())
    assert [list(one.values()) for one in found.positives] == [[2.0], [1.0]]


def test_lists_of_any_layout_are_mined():
    rows = [
        {"query": "q", "positive": "a", "negative_1": "b"},
        {"query": "r", "positive": "c", "negative_1": "b"},
    ]
    found = load_collection(rows)
    assert (found.corpus, found.positives) == (["a", "b", "c"], [{0: 1.0}, {2: 1.0}])
    rows = [{"q": "q", "doc": text, "label": value} for text, value in (("a", 1), ("b", 0))]
    assert load_collection(rows, columns={"query": "q"}).corpus == ["a", "b"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "headless", "json", "jsonl.gz"])
def test_pairs_to_score(kind: str, tmp_path: Path):
    rows = [{"id": str(i), "anchor": f"a query, {i}", "passage": f'"text" {i}'} for i in range(5)]
    if kind in ("csv", "tsv"):
        path = tmp_path / f"pairs.{kind}"
        pandas.DataFrame(rows).to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "headless":
        path = tmp_path / "top1000.tsv"
        path.write_text("".join(f"{r['id']}\t9\t{r['anchor']}\t{r['passage']}\n" for r in rows))
    elif kind == "json":
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(rows))
    else:
        path = tmp_path / "pairs.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    keep = "query_id" if kind == "headless" else "id"
    blocks = list(PairFile(path, {}, [keep], 2).blocks(lambda index: index != 1))
    assert [block.index for block in blocks] == [0, 2]
    pairs = [(row["anchor"], row["passage"]) for row in rows]
    assert [pair for block in blocks for pair in block.pairs] == [*pairs[:2], pairs[4]]
    assert [value for block in blocks for value in block.kept[keep].to_pylist()] == ["0", "1", "4"]


def test_lists_to_score_in_a_table(tmp_path: Path):
    path = tmp_path / "lists.csv"
    path.write_text('query,docs\nq,"[""a"", ""b""]"\nr,"[""c""]"\n')
    (block,) = PairFile(path, {}, [], 10).blocks(lambda index: True)
    assert (block.pairs, block.sizes) == ([("q", "a"), ("q", "b"), ("r", "c")], [2, 1])


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("me/lists", ("me/lists", None, "train")),
        ("me/lists[dev]", ("me/lists", None, "dev")),
        ("me/lists:pairs", ("me/lists", "pairs", "train")),
        ("me/lists:pairs[train[:10%]]", ("me/lists", "pairs", "train[:10%]")),
        ("lists:a-b.c[test]", ("lists", "a-b.c", "test")),
    ],
)
def test_a_hub_address(address: str, asked: tuple, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def load(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        seen.append((name, config, split))
        return datasets.Dataset.from_list([{"query": "q", "text": "a", "label": 1}])

    monkeypatch.setattr("rerank_fast.data.hub.load_dataset", load)
    assert load_lists(address).to_list() == lists_of(("q", ["a"], [1]))
    assert seen == [asked]
    assert names_of(address) == [asked[0]]
    if "[" in address:
        with pytest.raises(ValueError, match=r"names the split .* but split is 'other'"):
            load_lists(address, split="other")


def test_a_glob_without_a_file(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no file matches .*none-\*\.jsonl"):
        load_lists(str(tmp_path / "none-*.jsonl"))


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a shell gives it for a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text('{"id": "d", "text": "b"}\n')
    Path("queries.jsonl").write_text('{"id": "q", "text": "a"}\n')
    Path("qrels.tsv").write_text("q\td\t1\n")
    Path("run.tsv").write_text("q\td\t1\n")
    for source in ("", ["corpus.jsonl", ""]):
        with pytest.raises(ValueError, match="expected a path or a hub id, got ''"):
            load_lists(source)


def test_a_corpus_without_a_header_is_mined(tmp_path: Path):
    corpus = tsv(tmp_path / "collection.tsv.gz", {"1": "bear", "2": 'a "fish'})
    found = load_collection([{"query": "q", "positive_ids": [2]}], corpus)
    assert (found.corpus, found.positives) == (["bear", 'a "fish'], [{1: 1.0}])

"""NanoBEIR: equal to sentence-transformers' evaluator on the same files and model; its data and its
errors.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import ir_measures
import numpy as np
import pyarrow.parquet
import pytest

from rerank_fast.evaluation import NanoBEIREvaluator
from rerank_fast.model.cross_encoder import CrossEncoder
from tests.model_factory import make_tiny_bert
from tests.stand_ins import make_nano_beir

NAMES = ["msmarco", "NFCorpus", "nq"]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nano_beir(tmp_path_factory.mktemp("nano") / "NanoBEIR-en")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture(scope="module")
def model(tiny: Path) -> CrossEncoder:
    return CrossEncoder(tiny, device="cpu")


def csv_rows(directory: Path) -> dict[str, list[list[str]]]:
    found = {}
    for file in directory.glob("*_results*.csv"):
        with file.open(newline="", encoding="utf-8") as handle:
            found[file.name] = list(csv.reader(handle))
    return found


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(("rerank_k", "at_k"), [(100, 10), (12, 5)])
def test_equals_sentence_transformers(
    nano: Path,
    tiny: Path,
    model: CrossEncoder,
    tmp_path: Path,
    always: bool,
    rerank_k: int,
    at_k: int,
) -> None:
    peer = pytest.importorskip("sentence_transformers.cross_encoder")
    evaluation = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    settings = {"rerank_k": rerank_k, "at_k": at_k, "always_rerank_positives": always}
    theirs = evaluation.CrossEncoderNanoBEIREvaluator(NAMES, dataset_id=str(nano), **settings)
    ours = NanoBEIREvaluator(NAMES, nano, **settings)
    for one, scores in zip(ours.sets, np.split(ours.score(model), ours._bounds), strict=True):
        for values in one.split(scores):
            assert np.diff(np.sort(values)).min() > 1e-6  # no ties: the two break them differently
    expected = theirs(peer.CrossEncoder(str(tiny), device="cpu"), str(tmp_path / "theirs"), 1, 20)
    got = ours(model, str(tmp_path / "ours"), 1, 20)
    assert set(got) == set(expected)
    assert len({round(value, 6) for value in got.values()}) > 12  # not all the same by accident
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), abs=1e-9), name
    assert ours.primary_metric == theirs.primary_metric == f"NanoBEIR_R{rerank_k}_mean_ndcg@{at_k}"
    assert set(got) >= set(ours.metric_names)
    # Theirs on our model, ours on theirs, and the files of both.
    assert theirs(model) == pytest.approx(expected, abs=1e-9)
    on_theirs = ours(peer.CrossEncoder(str(tiny), device="cpu"))
    assert on_theirs == pytest.approx(got, abs=1e-9)
    files, their_files = csv_rows(tmp_path / "ours"), csv_rows(tmp_path / "theirs")
    assert files.keys() == their_files.keys()
    for name, rows in their_files.items():
        assert files[name][0] == rows[0]
        assert [float(value) for value in files[name][1]] == pytest.approx(
            [float(v) for v in rows[1]], abs=1e-9
        )


def test_all_sets_in_one_stream(
    nano: Path, model: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = NanoBEIREvaluator(NAMES, nano)
    calls = []
    score_tokens = CrossEncoder.score_tokens
    monkeypatch.setattr(
        CrossEncoder,
        "score_tokens",
        lambda self, tokens, **options: (
            calls.append(len(tokens)),
            score_tokens(self, tokens, **options),
        )[1],
    )
    evaluator(model)
    assert calls == [sum(len(one.pairs) for one in evaluator.sets)]


def test_runs_and_per_query_values_give_the_means_back(
    nano: Path, model: CrossEncoder, tmp_path: Path
) -> None:
    evaluator = NanoBEIREvaluator(
        NAMES,
        nano,
        metrics=["R@5", "P(rel=1)@3"],
        write_per_query=True,
        write_run=True,
        aggregate_key="mean",
    )
    got = evaluator(model, str(tmp_path))
    table = pyarrow.parquet.read_table(nano / "qrels" / "NanoNQ-00000-of-00001.parquet").to_pylist()
    judged = [ir_measures.Qrel(row["query-id"], row["corpus-id"], 1) for row in table]
    run = list(ir_measures.read_trec_run(str(tmp_path / "NanoNQ_R100.run")))
    again = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10, ir_measures.R @ 5, ir_measures.P @ 3], judged, run
    )
    assert got["NanoNQ_R100_ndcg@10"] == pytest.approx(again[ir_measures.nDCG @ 10], abs=1e-9)
    assert got["NanoNQ_R100_R@5"] == pytest.approx(again[ir_measures.R @ 5], abs=1e-9)
    assert got["NanoNQ_R100_P(rel=1)@3"] == pytest.approx(again[ir_measures.P @ 3], abs=1e-9)
    with (tmp_path / "NanoNQ_R100_per_query.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["query_id"] for row in rows] == [f"q{i}" for i in range(len(rows))]
    assert np.mean([float(row["ndcg@10"]) for row in rows]) == pytest.approx(
        got["NanoNQ_R100_ndcg@10"]
    )
    assert rows[0]["base_ndcg@10"] == "0.0"  # BM25 missed all of its documents
    each = evaluator.evaluate_per_query(model)
    assert {name: column.mean() for name, column in each.items()} == pytest.approx(got, abs=1e-12)


def test_other_aggregates(nano: Path, model: CrossEncoder) -> None:
    evaluator = NanoBEIREvaluator(NAMES, nano, aggregate_fn=max, aggregate_key="max")
    got = evaluator(model)
    assert got["NanoBEIR_R100_max_map"] == max(
        got[f"Nano{name}_R100_map"] for name in ("MSMARCO", "NFCorpus", "NQ")
    )
    assert "NanoBEIR_R100_max_map" not in evaluator.evaluate_per_query(model)


def test_json_lines_in_place_of_parquet(nano: Path, model: CrossEncoder, tmp_path: Path) -> None:
    for file in nano.glob("*/NanoNQ-*.parquet"):
        target = tmp_path / file.parent.name / "NanoNQ.jsonl"
        target.parent.mkdir()
        rows = pyarrow.parquet.read_table(file).to_pylist()
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert NanoBEIREvaluator(["nq"], tmp_path)(model) == NanoBEIREvaluator(["nq"], nano)(model)


def test_what_is_not_there_is_said(nano: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'marco' is no NanoBEIR set; there are climatefever, .*touche2020"
    ):
        NanoBEIREvaluator(["msmarco", "marco"], tmp_path / "never-read")
    with pytest.raises(
        ValueError, match=r"NanoSciFact.*there are \['NanoMSMARCO', 'NanoNFCorpus', 'NanoNQ'\]"
    ):
        NanoBEIREvaluator(["scifact"], nano)
    with pytest.raises(ValueError, match=r"some/nano.*offline.*local copy.*corpus/NanoNQ.parquet"):
        NanoBEIREvaluator(["nq"], "some/nano")
    with pytest.raises(ValueError, match=r"unknown metric 'fun@3'; there are .*nDCG"):
        NanoBEIREvaluator(["nq"], nano, metrics=["fun@3"])
    with pytest.raises(ValueError, match="rerank_k"):
        NanoBEIREvaluator(["nq"], nano, rerank_k=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):  # before the model is asked
        NanoBEIREvaluator(["nq"], nano, write_csv=False, write_run=True)(
            None, str(tmp_path / "file")
        )
    with pytest.raises(ValueError, match="batch_size"):
        NanoBEIREvaluator(["nq"], nano, batch_size=0)
    with pytest.raises(ValueError, match="dataset_names"):
        NanoBEIREvaluator("nq", nano)


def test_columns_and_documents_that_are_missing(nano: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nano"
    shutil.copytree(nano, broken)
    file = broken / "bm25" / "NanoNQ-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.rename_columns(["query-id", "ranking"]), file)
    with pytest.raises(
        ValueError, match=r"bm25, NanoNQ: no column corpus-ids; there are \['query-id', 'ranking'\]"
    ):
        NanoBEIREvaluator(["nq"], broken)
    rows = table.to_pylist()
    rows[2]["corpus-ids"][1] = "doc999"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(
        ValueError, match=r"query 'q2' in bm25: the corpus has no document 'doc999'"
    ):
        NanoBEIREvaluator(["nq"], broken)
    rows[2] = {"query-id": "q99", "corpus-ids": ["doc1"]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(ValueError, match=r"'q99', which queries does not have"):
        NanoBEIREvaluator(["nq"], broken)


@pytest.mark.parametrize(("subset", "place"), [("queries", "q1"), ("corpus", "q0' in .*doc.*")])
def test_a_text_that_is_missing(nano: Path, tmp_path: Path, subset: str, place: str) -> None:
    for file in nano.glob("*/NanoNQ-*.parquet"):
        target = tmp_path / file.parent.name / "NanoNQ.jsonl"
        target.parent.mkdir()
        rows = pyarrow.parquet.read_table(file).to_pylist()
        for row in rows[1:] if file.parent.name == subset else ():
            row["text"] = None
        target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = f"NanoNQ, query '{place}.*: expected a string, got NoneType"
    with pytest.raises(ValueError, match=message):
        NanoBEIREvaluator(["nq"], tmp_path)

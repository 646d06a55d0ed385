"""Ties: metrics against ir-measures' mean over all orders; what a constant model is worth; runs."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import ir_measures
import numpy as np
import pytest

from rerank_fast.evaluation import (
    NanoBEIREvaluator,
    RerankingEvaluator,
    ranking_metrics,
    tied_pairs,
)
from rerank_fast.evaluation.candidates import Candidates
from rerank_fast.evaluation.measured import MeasuredSet
from tests.stand_ins import make_nano_beir

EXACT = [
    "P@3",
    "R@3",
    "Success@2",
    "AP@4",
    "RR@4",
    "nDCG",
    "P(rel=2)@3",
    "AP(rel=2)",
    "RR(rel=3)@2",
]


class Constant:
    """A model that has collapsed."""

    model_card_data = None

    def predict(self, pairs: Any, **options: Any) -> np.ndarray:
        return np.zeros(len(pairs), dtype=np.float32)


def mean_over_orders(labels: np.ndarray, scores: np.ndarray, names: list[str]) -> dict[str, float]:
    """Each metric by ir-measures, in every order that the scores allow."""
    measures = {name: ir_measures.parse_measure(name) for name in names}
    judged = {"q": {str(i): int(max(label, 0)) for i, label in enumerate(labels)}}
    values: dict[str, list[float]] = {name: [] for name in names}
    for shuffled in itertools.permutations(range(len(labels))):
        order = sorted(shuffled, key=lambda i: -scores[i])
        run = {"q": {str(i): float(len(order) - rank) for rank, i in enumerate(order)}}
        found = ir_measures.calc_aggregate(list(measures.values()), judged, run)
        for name, measure in measures.items():
            values[name].append(found[measure])
    return {name: float(np.mean(one)) for name, one in values.items()}


@pytest.mark.parametrize("seed", range(12))
def test_the_mean_over_all_orders(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(1, 7))
    labels = generator.integers(-1, 4, size)
    scores = generator.integers(0, 3, size).astype(float)
    got = ranking_metrics([labels], [scores], at_k=3, metrics=EXACT)
    expected = mean_over_orders(labels, scores, ["AP", "RR@3", "nDCG@3", *EXACT])
    for name, value in zip(got, expected.values(), strict=True):
        assert got[name][0] == pytest.approx(value, abs=2e-7), name  # trec_eval rounds


def test_other_metrics_are_the_mean_over_some_orders() -> None:
    """Within four standard errors; exact where nothing relevant ties with anything else."""
    labels, scores = np.array([1, 0, 0, 1, 0, 0]), np.array([1.0, 1, 1, 0, 0, 0])
    names = ["Rprec", "Bpref"]
    got = ranking_metrics([labels], [scores], metrics=names)
    again = ranking_metrics([labels[[2, 1, 0, 5, 4, 3]]], [scores], metrics=names)
    for name, value in mean_over_orders(labels, scores, names).items():
        assert got[name][0] == pytest.approx(value, abs=4 * 0.05)
        assert again[name][0] == pytest.approx(value, abs=4 * 0.05)
    alone = ranking_metrics([[1, 0, 0]], [[2, 1, 1]], metrics=names)
    assert [alone[name][0] for name in names] == [1, 1]


@pytest.mark.parametrize("size", [2, 12, 300])
def test_order_of_input_is_no_matter(size: int) -> None:
    first = np.zeros(size)
    first[0] = 1
    result = ranking_metrics([first, first[::-1]], [np.zeros(size)] * 2, metrics=[f"ndcg@{size}"])
    places = np.arange(1, size + 1)
    for name, value in {
        "map": np.mean(1 / places),
        "mrr@10": np.sum(1 / places[:10]) / size,
        f"ndcg@{size}": np.mean(1 / np.log2(places + 1)),
    }.items():
        np.testing.assert_allclose(result[name], [value] * 2, rtol=1e-12)


def test_ndcg_is_scikit_learns() -> None:
    """Which averages over ties too, and so does sentence-transformers."""
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = generator.integers(0, 4, 30), generator.integers(0, 6, 30)
        expected = sklearn.ndcg_score([labels], [scores], k=10)
        assert ranking_metrics([labels], [scores])["ndcg@10"][0] == pytest.approx(expected)


def test_share_of_tied_pairs() -> None:
    assert tied_pairs([[1, 0, 0]], [[0, 0, 1]]) == 0.5
    assert tied_pairs([[1, 0, -1], [2, 1, 0]], [[5, 5, 5], [1, 2, 2]]) == pytest.approx(3 / 5)
    assert tied_pairs([[0, 0]], [[1, 1]]) == tied_pairs([], []) == 0


def samples(kind: str) -> Any:
    return {
        "lists": [{"query": "q", "docs": ["a", "b", "c"], "labels": [1, 0, 0]}],
        "negative": [{"query": "q", "positive": ["a"], "negative": ["b", "c"]}],
        "documents": [{"query": "q", "positive": ["a"], "documents": ["b", "c", "a"]}],
    }[kind]


@pytest.mark.parametrize("kind", ["lists", "negative", "documents"])
@pytest.mark.parametrize("always", [True, False])
def test_a_constant_model_is_worth_what_chance_is(
    kind: str, always: bool, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = RerankingEvaluator(samples(kind), always_rerank_positives=always)
    with caplog.at_level(logging.INFO, logger="rerank_fast"):
        got = evaluator(Constant())
    assert got["map"] == got["mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert got["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / 2) / 3)
    (line,) = (record for record in caplog.records if "tie in score" in record.message)
    assert line.levelno == logging.WARNING
    assert "100.00% of the preference pairs" in line.message


def test_a_constant_model_on_nano_beir_has_sentence_transformers_ndcg(tmp_path: Path) -> None:
    evaluation = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    nano = make_nano_beir(tmp_path)
    theirs = evaluation.CrossEncoderNanoBEIREvaluator(["nq"], dataset_id=str(nano))
    for one in theirs.evaluators:
        one.store_metrics_in_model_card_data = lambda *args, **kwargs: None
    theirs.store_metrics_in_model_card_data = lambda *args, **kwargs: None
    expected, got = theirs(Constant()), NanoBEIREvaluator(["nq"], nano)(Constant())
    assert got["NanoNQ_R100_ndcg@10"] == pytest.approx(expected["NanoNQ_R100_ndcg@10"], abs=1e-9)
    assert max(got[f"NanoNQ_R100_{name}"] for name in ("map", "mrr@10", "ndcg@10")) < 0.8


def measured(
    scores: list[list[float]], doc_ids: list[list[str]], query_ids: list[str]
) -> tuple[Any, Any]:
    candidates = [
        Candidates(key, "q", ["d"] * len(ids), ids, np.eye(len(ids))[0], None)
        for key, ids in zip(query_ids, doc_ids, strict=True)
    ]
    return MeasuredSet(candidates, name="", at_k=10, metrics=()), np.concatenate(scores)


def test_scores_of_a_run_fall_strictly(tmp_path: Path) -> None:
    """Whatever a reader makes of equal scores; and as fp32, which trec_eval keeps."""
    inf = np.inf
    lists = [
        [0.0] * 5,
        [1.0, 1.0 + 1e-12, 2.5, 2.5, 0.1],
        [inf, inf, -inf, -inf, 0.0],
        [3.4e38, 3.4e38, -3.4e38, -3.4e38, 1e-45],
    ]
    ids, queries = [["a", "b", "c", "d", "e"]] * len(lists), ["w", "x", "y", "z"]
    one, scores = measured(lists, ids, queries)
    one.write_run(tmp_path / "run", scores)
    for values, query in zip(lists, queries, strict=True):
        rows = [
            row for row in ir_measures.read_trec_run(str(tmp_path / "run")) if row.query_id == query
        ]
        written = np.array([row.score for row in rows])
        assert (np.diff(written) < 0).all()
        assert (np.diff(written.astype(np.float32)) < 0).all()
        ranked = [values["abcde".index(row.doc_id)] for row in rows]
        assert ranked == sorted(values, reverse=True)
    assert "x Q0 e 5 0.1 rerank_fast\n" in (tmp_path / "run").read_text()


def test_a_run_of_ties_knows_no_labels(tmp_path: Path) -> None:
    """Over many queries the run of a constant model measures what the evaluator printed."""
    count, ids = 400, ["p0", "d0", "d1"]
    one, scores = measured([[0.0] * 3] * count, [ids] * count, [str(q) for q in range(count)])
    one.write_run(tmp_path / "run", scores)
    judged = {str(q): {"p0": 1} for q in range(count)}
    run = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    again = ir_measures.calc_aggregate([ir_measures.RR], judged, run)[ir_measures.RR]
    error = np.std([1, 1 / 2, 1 / 3]) / np.sqrt(count)
    assert again == pytest.approx(one.measure(scores)["mrr@10"].mean(), abs=4 * error)
    first = (tmp_path / "run").read_text()
    one.write_run(tmp_path / "run", scores)
    assert (tmp_path / "run").read_text() == first


def test_any_id_is_read_back(tmp_path: Path) -> None:
    ids = ["a b", "a%20b", "tab\tbed", "new\nline", "\u3000wide", "", " ", "%", "plain/ü"]
    one, scores = measured([list(range(len(ids)))], [ids], ["the query"])
    one.write_run(tmp_path / "run", scores)
    rows = list(ir_measures.read_trec_run(str(tmp_path / "run")))
    assert {unquote(row.query_id) for row in rows} == {"the query"}
    found = [row.doc_id for row in reversed(rows)]
    assert [unquote(key) if key != "%" else "" for key in found] == ids
    assert len(set(found)) == len(ids)

"""sentence-transformers' samples: its numbers both ways, its trainer, metrics by name, two models
compared.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from datasets import Dataset

from rerank_fast.evaluation import NanoBEIREvaluator, RerankingEvaluator, compare, ranking_metrics
from tests.evaluation.test_reranking import Stub
from tests.model_factory import make_tiny_bert
from tests.stand_ins import make_nano_beir


def random_samples(seed: int, kind: str, count: int = 50) -> tuple[list[dict[str, Any]], Stub]:
    """Rankings that miss some positives, and a few all of them; or positives and negatives."""
    generator = np.random.default_rng(seed)
    samples, scores = [], {}
    for q in range(count):
        docs = [f"doc {q} {i}" for i in range(generator.integers(4, 30))]
        count_positive = int(generator.integers(1, 4))
        chosen = set(generator.choice(len(docs), count_positive, replace=False).tolist())
        positive = [doc for i, doc in enumerate(docs) if i in chosen]
        found = [doc for doc in docs if doc not in positive or (q % 7 and generator.random() < 0.7)]
        sample = {
            "query": f"query {q}",
            "positive": positive[0] if count_positive == 1 else positive,
        }
        if kind == "negative" or (kind == "both" and q % 3 == 0):
            sample["negative"] = [doc for doc in docs if doc not in positive]
        else:
            sample["documents"] = found
        samples.append(sample)
        scores.update(
            {
                (f"query {q}", doc): float(s)
                for doc, s in zip(docs, generator.normal(size=30), strict=False)
            }
        )
    return samples, Stub(scores)


@pytest.mark.parametrize("kind", ["documents", "negative", "both"])
@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("at_k", [10, 3])
def test_equals_sentence_transformers(kind: str, always: bool, at_k: int) -> None:
    evaluation = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    samples, model = random_samples(at_k, kind)
    theirs = evaluation.CrossEncoderRerankingEvaluator(
        samples, at_k=at_k, name="dev", always_rerank_positives=always
    )
    theirs.store_metrics_in_model_card_data = lambda *args, **kwargs: None
    expected = theirs(model)
    got = RerankingEvaluator(samples, at_k, "dev", always_rerank_positives=always)(model)
    assert set(got) == set(expected)
    assert ("dev_base_map" in got) == (kind != "negative")
    for name, value in expected.items():
        assert got[name] == pytest.approx(float(value), abs=1e-9), name
    if kind == "documents":
        assert got == RerankingEvaluator(
            {str(i): sample for i, sample in enumerate(samples)},
            at_k,
            "dev",
            always_rerank_positives=always,
        )(model)
        other = RerankingEvaluator(samples, at_k, "dev", always_rerank_positives=not always)(model)
        assert other["dev_map"] != got["dev_map"]


def test_samples_of_a_dataset(tmp_path: Path) -> None:
    samples = [
        {"query": "q", "positive": ["a", "c"], "documents": ["b", "a"]},
        {"query": "r", "positive": ["b"], "documents": ["a", "b"]},
    ]
    model = Stub({(q, d): s for q in "qr" for d, s in zip("abc", (3.0, 2.0, 1.0), strict=True)})
    evaluator = RerankingEvaluator(Dataset.from_list(samples), write_per_query=True, write_run=True)
    got = evaluator(model, str(tmp_path))
    # q: a (relevant), b, c (relevant); r: a, b (relevant). BM25's q: b, a, then c, which it missed.
    assert got["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert got["base_map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1 / 2) / 2)
    assert got["mrr@10"] == 0.75
    run = (tmp_path / "CrossEncoderRerankingEvaluator.run").read_text().splitlines()
    assert run[:2] == ["0 Q0 p0 1 3.0 rerank_fast", "0 Q0 d0 2 2.0 rerank_fast"]
    with (tmp_path / "CrossEncoderRerankingEvaluator_per_query.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == [
        "query_id",
        "map",
        "mrr@10",
        "ndcg@10",
        "base_map",
        "base_mrr@10",
        "base_ndcg@10",
    ]
    assert [float(row[2]) for row in rows[1:]] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            {"positive": ["a"], "documents": ["a"]},
            r"sample 1: expected query.*\['documents', 'positive'\]",
        ),
        ({"query": "q", "negative": ["a"]}, r"sample 1: expected query, positive"),
        ({"query": "q", "positive": ["a"]}, r"either documents or negative"),
        (
            {"query": "q", "positive": ["a"], "documents": ["a"], "negative": ["b"]},
            "either documents or negative",
        ),
        (
            {"query": "q", "positive": ["a"], "documents": "a"},
            r"sample 1, field documents: expected a list",
        ),
        ({"query": "q", "positive": [3], "documents": ["a"]}, r"sample 1, field positive"),
        ({"query": " ", "positive": ["a"], "documents": ["a"]}, r"sample 1, field query"),
        (
            {"query": None, "positive": ["a"], "documents": ["a"]},
            r"field query: expected a string, got NoneType",
        ),
        (
            {"query": "q", "positive": "a", "documents": ["a", None]},
            r"sample 1, field documents\[1\]: expected a string, got NoneType None",
        ),
        (
            {"query": "q", "positive": "a", "negative": ["b", "\ud800"]},
            r"sample 1, field negative\[1\]: not valid Unicode",
        ),
        (
            {"query": "\udfff", "positive": "a", "negative": ["b"]},
            r"sample 1, field query: not valid Unicode",
        ),
        (
            {"query": "q", "positive": None, "negative": ["b"]},
            r"field positive: expected a list.*got None",
        ),
    ],
)
def test_malformed_sample(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RerankingEvaluator([{"query": "q", "positive": ["a"], "documents": ["a", "b"]}, sample])


def test_metrics_by_name() -> None:
    labels, scores = [np.array([0, 3, 1, 0])], [np.array([0.9, 0.8, 0.1, 0.2])]
    got = ranking_metrics(labels, scores, metrics=["r@2", "P(rel=2)@2", "ndcg@2", "Bpref"])
    assert got["r@2"].tolist() == [0.5]
    assert got["P(rel=2)@2"].tolist() == [0.5]
    assert got["ndcg@2"][0] == pytest.approx((3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    run = {"q": dict(zip("abcd", scores[0].tolist(), strict=True))}
    measure = ir_measures.Bpref
    expected = ir_measures.calc_aggregate([measure], {"q": {"a": 0, "b": 3, "c": 1, "d": 0}}, run)[
        measure
    ]
    assert got["Bpref"][0] == pytest.approx(expected)
    for name, message in {
        "fun": "unknown metric 'fun'; there are",
        "ndcg@x": "can't be",
        "": "unknown metric",
    }.items():
        with pytest.raises(ValueError, match=message):
            ranking_metrics(labels, scores, metrics=[name])


def test_paired_test_has_its_level_and_its_power() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(60)
    p_values = [
        compare(base, base + generator.normal(size=60), resamples=300).p_value for _ in range(100)
    ]
    assert 0.3 < np.mean(np.array(p_values) < 0.5) < 0.7  # uniform under the null hypothesis
    better = compare(base, base + 0.3 + 0.1 * generator.normal(size=60))
    assert better.p_value < 0.001
    assert 0.25 < better.low < better.difference < better.high < 0.35
    assert better.difference == pytest.approx(better.b - better.a)
    # Three queries have 8 sign patterns, of which 2 are as extreme: exact.
    assert compare(np.zeros(3), np.array([1.0, 2.0, 3.0])).p_value == pytest.approx(2 / 8)
    assert compare(base, base).p_value == 1.0
    with pytest.raises(ValueError, match="same queries"):
        compare(base, base[1:])


def test_inside_sentence_transformers_trainer(tmp_path: Path) -> None:
    peer = pytest.importorskip("sentence_transformers.cross_encoder")
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    model = peer.CrossEncoder(str(make_tiny_bert(tmp_path / "bert")), device="cpu")
    nano = NanoBEIREvaluator(["nq", "msmarco"], make_nano_beir(tmp_path / "nano"))
    samples, _ = random_samples(1, "documents", count=8)
    train = Dataset.from_list(
        [{"query": "panda", "docs": ["panda", "sea", "rain"], "labels": [1, 0, 0]}] * 8
    )
    arguments = peer.CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{nano.primary_metric}",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    trainer = peer.CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        loss=losses.LambdaLoss(model),
        evaluator=[RerankingEvaluator(samples, name="dev"), nano],
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if f"eval_{nano.primary_metric}" in row]
    assert [row["step"] for row in logged] == [2, 4]
    assert trainer.state.best_metric == max(row[f"eval_{nano.primary_metric}"] for row in logged)
    assert {"eval_dev_map", "eval_NanoNQ_R100_base_mrr@10"} <= logged[0].keys()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == trainer.state.best_metric
    assert (tmp_path / "out" / "eval" / "NanoBEIR_evaluation_mean_results.csv").is_file()
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "NanoBEIR_R100_mean" in card
    assert "Cross Encoder Nano BEIR" in card

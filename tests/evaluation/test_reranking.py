"""The evaluator: equal to sentence-transformers' on untied scores; one call, cached tokens, CSV."""

from __future__ import annotations

import csv
import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from rerank_fast.evaluation import RerankingEvaluator
from rerank_fast.model.cross_encoder import CrossEncoder
from tests.full_disk import files_up_to
from tests.model_factory import make_tiny_bert

LISTS = [
    {"query": "what is a panda", "docs": ["sea and rain", "a bear", "bamboo"], "labels": [0, 1, 1]},
    {"query": "capital of france", "docs": ["paris is the capital", "berlin"], "labels": [1, 0]},
    {"query": "rain", "docs": ["sun", "wind"], "labels": [0, 0]},
]


class Stub:
    """Scores by a table; counts the calls."""

    model_card_data = None

    def __init__(self, scores: dict[tuple[str, str], float]) -> None:
        self.scores = scores
        self.calls: list[list[tuple[str, str]]] = []

    def predict(self, pairs: Sequence[Sequence[str]], **options: Any) -> np.ndarray:
        self.calls.append([(query, doc) for query, doc in pairs])
        return np.array([self.scores[query, doc] for query, doc in pairs])


def random_lists(seed: int, count: int = 60) -> tuple[list[dict[str, Any]], Stub]:
    """Lists of 1 to 30 different documents, some without a relevant one, and untied scores."""
    generator = np.random.default_rng(seed)
    lists, scores = [], {}
    for q in range(count):
        docs = [f"doc {q} {i}" for i in range(generator.integers(1, 31))]
        labels = (generator.random(len(docs)) < 0.2).astype(float)
        lists.append({"query": f"query {q}", "docs": docs, "labels": labels.tolist()})
        scores.update(
            {
                (f"query {q}", doc): float(s)
                for doc, s in zip(docs, generator.normal(size=len(docs)), strict=True)
            }
        )
    assert any(not any(row["labels"]) for row in lists)
    return lists, Stub(scores)


@pytest.mark.parametrize(("at_k", "name"), [(10, ""), (3, "dev"), (50, "x")])
def test_equals_sentence_transformers(at_k: int, name: str) -> None:
    oracle = pytest.importorskip("sentence_transformers.cross_encoder.evaluation")
    lists, model = random_lists(seed=at_k)
    samples = [
        {
            "query": row["query"],
            "positive": [
                doc for doc, label in zip(row["docs"], row["labels"], strict=True) if label > 0
            ],
            "documents": row["docs"],
        }
        for row in lists
    ]
    theirs_evaluator = oracle.CrossEncoderRerankingEvaluator(samples, at_k=at_k, name=name)
    # Their model card is no part of a score.
    theirs_evaluator.store_metrics_in_model_card_data = lambda *args, **kwargs: None
    theirs = theirs_evaluator(model)
    evaluator = RerankingEvaluator(lists, at_k=at_k, name=name)
    ours = evaluator(model)
    assert set(ours) == set(theirs)
    for metric, value in theirs.items():
        assert ours[metric] == pytest.approx(value, abs=1e-9), metric
    assert evaluator.primary_metric == theirs_evaluator.primary_metric


def test_all_pairs_in_one_call() -> None:
    lists, model = random_lists(seed=1, count=20)
    RerankingEvaluator(lists)(model)
    assert model.calls == [[(row["query"], doc) for row in lists for doc in row["docs"]]]


def test_per_query_values_and_their_means() -> None:
    lists, model = random_lists(seed=2)
    evaluator = RerankingEvaluator(lists, name="dev")
    means, each = evaluator(model), evaluator.evaluate_per_query(model)
    assert set(means) == {f"dev_{name}" for name in each}
    for name, values in each.items():
        assert values.shape == (len(lists),)
        assert means[f"dev_{name}"] == pytest.approx(values.mean())


def test_duplicate_documents_count_each_in_either_place() -> None:
    lists = [{"query": "q", "docs": ["a", "b", "b", "a"], "labels": [0, 0, 1, 1]}]
    result = RerankingEvaluator(lists)(Stub({("q", "a"): 1.0, ("q", "b"): 2.0}))
    # One of the two b in ranks 1 and 2, one of the two a in ranks 3 and 4.
    assert result["map"] == pytest.approx(((1 + 1 / 2) / 2 + (2 / 3 + 2 / 4) / 2) / 2)
    assert result["mrr@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["base_mrr@10"] == pytest.approx(1 / 3)


def test_nan_score_names_the_list() -> None:
    lists, model = random_lists(seed=3, count=20)
    model.scores[lists[4]["query"], lists[4]["docs"][0]] = float("nan")
    with pytest.raises(ValueError, match=r"list 4\b"):
        RerankingEvaluator(lists)(model)


@pytest.mark.parametrize("at_k", [0, -3])
def test_cut_below_one(at_k: int) -> None:
    with pytest.raises(ValueError, match="at_k"):
        RerankingEvaluator(LISTS, at_k=at_k)


def test_labels_of_numpy_and_torch() -> None:
    lists, model = random_lists(seed=5, count=20)
    expected = RerankingEvaluator(lists)(model)
    for dtype in (np.float32, np.float64, np.int64, bool):
        arrays = [{**row, "labels": np.array(row["labels"], dtype)} for row in lists]
        assert RerankingEvaluator(arrays)(model) == expected
        numbers = [{**row, "labels": list(row["labels"])} for row in arrays]
        assert RerankingEvaluator(numbers)(model) == expected
    tensors = [
        {**row, "docs": np.array(row["docs"]), "labels": torch.tensor(row["labels"])}
        for row in lists
    ]
    assert RerankingEvaluator(tensors)(model) == expected
    with pytest.raises(
        ValueError, match=r"row 0, field labels\[1\]: expected a finite float32, got nan"
    ):
        RerankingEvaluator([{"query": "q", "docs": ["a", "b"], "labels": np.array([1, np.nan])}])


def test_malformed_list() -> None:
    with pytest.raises(ValueError, match=r"row 1\b.*docs"):
        RerankingEvaluator([LISTS[0], {"query": "q", "docs": [], "labels": []}])


def test_csv_grows_by_a_row_a_call(tmp_path: Path) -> None:
    lists, model = random_lists(seed=4, count=20)
    evaluator = RerankingEvaluator(lists, name="dev")
    result = evaluator(model, output_path=str(tmp_path / "new"), epoch=0, steps=10)
    evaluator(model, output_path=str(tmp_path / "new"), epoch=1, steps=20)
    (file,) = (tmp_path / "new").iterdir()
    with file.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["epoch", "steps", "MAP", "MRR@10", "NDCG@10"]
    assert [row[:2] for row in rows[1:]] == [["0", "10"], ["1", "20"]]
    assert [float(value) for value in rows[1][2:]] == [
        pytest.approx(result[f"dev_{metric}"]) for metric in ("map", "mrr@10", "ndcg@10")
    ]


def test_csv_of_a_name_with_a_slash_and_where_nothing_can_be_written(tmp_path: Path) -> None:
    lists, model = random_lists(seed=4, count=20)
    RerankingEvaluator(lists, name="a/b")(model, output_path=str(tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [
        "CrossEncoderRerankingEvaluator_a_b_results_@10.csv"
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        # Before the model is asked.
        RerankingEvaluator(lists)(None, output_path=str(tmp_path / "file"))


def test_table_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rerank_fast"):
        RerankingEvaluator(LISTS)(
            Stub({(row["query"], doc): 0.0 for row in LISTS for doc in row["docs"]})
        )
    assert "->" in caplog.text
    assert "ndcg@10" in caplog.text.lower()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoder:
    return CrossEncoder(str(make_tiny_bert(tmp_path_factory.mktemp("tiny"))), device="cpu")


def test_tokens_are_kept_for_the_same_model(
    model: CrossEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    tokenize = CrossEncoder.tokenize

    def counting(self: CrossEncoder, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return tokenize(self, *args, **kwargs)

    monkeypatch.setattr(CrossEncoder, "tokenize", counting)
    evaluator = RerankingEvaluator(LISTS)
    assert evaluator(model) == evaluator(model)
    assert len(calls) == 1
    monkeypatch.setattr(model, "max_length", 8)
    evaluator(model)
    assert len(calls) == 2


LONG = [
    {
        "query": "what is a panda",
        "docs": ["the sea and rain " * 9, "bear " * 9 + "bamboo"],
        "labels": [0, 1],
    }
]


@pytest.mark.parametrize(
    "change", ["prompt", "truncation_side", "normalizer", "tokenizer", "max_length"]
)
def test_tokens_are_those_of_the_model_as_it_is(change: str, tmp_path: Path) -> None:
    """Whatever changes what tokenize gives is seen by an evaluator that has tokens of before."""
    model = CrossEncoder(str(make_tiny_bert(tmp_path)), device="cpu", max_length=16)
    kept = RerankingEvaluator(LONG)
    before = kept.score(model)
    if change == "prompt":
        model.prompts, model.default_prompt_name = {"p": "capital of france"}, "p"
    elif change == "truncation_side":
        model.tokenizer.truncation_side = "left"
    elif change == "normalizer":
        model.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace(
            "panda", "sun"
        )
    elif change == "tokenizer":
        model.tokenizer = transformers.AutoTokenizer.from_pretrained(
            tmp_path, truncation_side="left"
        )
    else:
        model.max_length = 12
    after = kept.score(model)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(after, RerankingEvaluator(LONG).score(model))


def test_a_tokenizer_that_no_key_can_be_made_of_is_asked_each_time(tmp_path: Path) -> None:
    model = CrossEncoder(str(make_tiny_bert(tmp_path)), device="cpu")
    model.tokenizer.own = lambda: None  # which pickle refuses
    assert model.tokenization_key() != model.tokenization_key()
    evaluator = RerankingEvaluator(LONG)
    np.testing.assert_array_equal(evaluator.score(model), evaluator.score(model))


def test_evaluators_in_threads(tmp_path: Path) -> None:
    """One evaluator, two models of different max_length, four threads, in training mode."""
    directory = str(make_tiny_bert(tmp_path))
    models = [
        CrossEncoder(directory, device="cpu", max_length=length).train() for length in (8, 16)
    ]
    evaluator = RerankingEvaluator(LONG)
    expected = [RerankingEvaluator(LONG).score(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: evaluator.score(models[n % 2]), range(40)))
    for n, scores in enumerate(found):
        np.testing.assert_allclose(scores, expected[n % 2], rtol=1e-6)
    assert all(module.training for model in models for module in model.modules())


def test_model_is_not_kept_alive(tmp_path: Path) -> None:
    other = CrossEncoder(str(make_tiny_bert(tmp_path)), device="cpu")
    alive = weakref.ref(other)
    evaluator = RerankingEvaluator(LISTS)
    evaluator(other)
    del other
    gc.collect()
    assert alive() is None


def test_saturating_activation_does_not_tie(model: CrossEncoder) -> None:
    """A sigmoid of large scores is 1 for all of them in fp32: the order must be that of the raw
    scores.
    """
    evaluator = RerankingEvaluator(LISTS)
    activation = model.activation_fn
    try:
        model.activation_fn = torch.nn.Identity()
        raw = evaluator(model)
        model.activation_fn = lambda scores: torch.sigmoid(scores + 1000)
        assert evaluator(model) == raw
    finally:
        model.activation_fn = activation


@pytest.mark.parametrize("file", ["_results_@10.csv", "_per_query.csv", ".run"])
def test_a_full_disk_is_said_with_the_files_name(tmp_path: Path, file: str) -> None:
    lists, model = random_lists(0)
    options = {
        "write_csv": "results" in file,
        "write_per_query": "query" in file,
        "write_run": "run" in file,
    }
    evaluator = RerankingEvaluator(lists, **options)
    if file == "_results_@10.csv":
        evaluator(model, str(tmp_path))  # the header is there, and the next row does not fit
    size = sum(one.stat().st_size for one in tmp_path.iterdir()) or 100
    with (
        files_up_to(size),
        pytest.raises(ValueError, match=rf"can't write \S*Evaluator{file}: \w+") as error,
    ):
        evaluator(model, str(tmp_path))
    assert "\n" not in str(error.value)

"""CrossEncoder beside sentence-transformers and transformers: the same directories, the same
scores.
"""

from __future__ import annotations

import json
import logging
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rerank_fast import CrossEncoder
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.precision.hardware import product_seconds
from tests.model_factory import make_tiny_bert, make_tiny_roberta

QUERY = "how many people live in berlin"
PASSAGES = [
    "berlin museum",
    "the population of berlin is 3520031 and all the people live in the city of berlin or over the "
    "sea",
    "rain",
    "a panda eats bamboo all day long and is a kind of bear",
    "people of paris live in the capital of france",
    "rain",
]
PAIRS = [(QUERY, passage) for passage in PASSAGES]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = {"bert": make_tiny_bert, "roberta": make_tiny_roberta}[request.param]
    return make(tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture
def model(directory: Path) -> CrossEncoder:
    return CrossEncoder(directory, device="cpu")


def logits_by_transformers(directory: Path) -> np.ndarray:
    """One pair at a time, so without any padding."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.inference_mode():
        return np.array(
            [
                model(
                    **tokenizer(*pair, truncation=True, max_length=64, return_tensors="pt")
                ).logits.item()
                for pair in PAIRS
            ]
        )


def test_predict_equals_sentence_transformers(directory: Path, model: CrossEncoder):
    peer = PeerCrossEncoder(str(directory), device="cpu", max_length=64)
    np.testing.assert_allclose(model.predict(PAIRS), peer.predict(PAIRS), rtol=0, atol=1e-5)
    for batch_size in (1, 4, 100):
        ours = model.predict(PAIRS, batch_size=batch_size, activation_fn=nn.Identity())
        np.testing.assert_allclose(
            ours, peer.predict(PAIRS, activation_fn=nn.Identity()), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(ours, logits_by_transformers(directory), rtol=1e-5, atol=1e-5)


def test_predict_returns_what_sentence_transformers_returns(directory: Path, model: CrossEncoder):
    peer = PeerCrossEncoder(str(directory), device="cpu")
    assert isinstance(model.predict(PAIRS), np.ndarray)
    assert model.predict(PAIRS).dtype == peer.predict(PAIRS).dtype
    assert isinstance(model.predict(PAIRS, convert_to_tensor=True), torch.Tensor)
    listed = model.predict(PAIRS, convert_to_numpy=False)
    assert isinstance(listed, list)
    assert len(listed) == len(PAIRS)
    assert np.ndim(model.predict(PAIRS[0])) == np.ndim(peer.predict(PAIRS[0])) == 0
    assert model.predict(list(PAIRS[0])) == pytest.approx(float(model.predict(PAIRS)[0]), abs=1e-6)
    assert model.predict(np.array(PAIRS)).shape == (len(PAIRS),)
    assert len(model.predict([])) == 0


def test_rank_equals_sentence_transformers(directory: Path, model: CrossEncoder):
    peer = PeerCrossEncoder(str(directory), device="cpu", max_length=64)
    distinct = PASSAGES[:-1]
    for options in (
        {},
        {"top_k": 2},
        {"return_documents": True},
        {"top_k": 99, "return_documents": True},
    ):
        ours, theirs = model.rank(QUERY, distinct, **options), peer.rank(QUERY, distinct, **options)
        assert [hit["corpus_id"] for hit in ours] == [hit["corpus_id"] for hit in theirs]
        assert [hit.get("text") for hit in ours] == [hit.get("text") for hit in theirs]
        assert [hit["score"] for hit in ours] == pytest.approx(
            [float(hit["score"]) for hit in theirs], abs=1e-5
        )
        assert [set(hit) for hit in ours] == [set(hit) for hit in theirs]
    tied = [hit["corpus_id"] for hit in model.rank(QUERY, ["rain", "sea", "rain", "rain"])]
    assert [i for i in tied if i != 1] == [0, 2, 3]
    assert model.rank(QUERY, []) == []
    with pytest.raises(ValueError, match="top_k must be None or at least 1, got 0"):
        model.rank(QUERY, PASSAGES, top_k=0)


def test_scoring_leaves_the_training_mode_as_it_was(model: CrossEncoder):
    model.train()
    first, second = model.predict(PAIRS), model.predict(PAIRS)
    assert model.training
    assert (first == second).all()  # no dropout


def test_texts_are_truncated_in_tokens(model: CrossEncoder):
    assert model.max_length == 64
    long = "the sea is wet and " * 100
    assert model.tokenize([(QUERY, long), ("rain", "sea")]).lengths.tolist() == [64, 5]
    assert np.isfinite(model.predict([(QUERY, long), (long, QUERY)])).all()
    model.max_length = 16
    assert model.tokenize([(QUERY, long)]).lengths.tolist() == [16]
    with pytest.raises(ValueError, match=r"max_length is 65, but .* has 64 positions"):
        model.max_length = 65
    with pytest.raises(ValueError, match="must leave room"):
        model.max_length = 3


def test_a_longer_limit_than_the_tokenizers_is_the_users_choice(tmp_path: Path):
    make_tiny_bert(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path)
    assert CrossEncoder(tmp_path).max_length == 8
    assert CrossEncoder(tmp_path, max_length=32).max_length == 32


@pytest.mark.parametrize("activation", [nn.Identity(), nn.Sigmoid(), nn.Tanh()])
def test_saved_models_open_everywhere_with_the_same_scores(
    model: CrossEncoder, tmp_path: Path, activation: nn.Module
):
    model.activation_fn = activation
    scores = model.predict(PAIRS)
    model.save_pretrained(tmp_path / "saved")
    peer = PeerCrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(peer.activation_fn) is type(activation)
    np.testing.assert_allclose(peer.predict(PAIRS), scores, rtol=0, atol=1e-5)
    again = CrossEncoder(tmp_path / "saved", device="cpu")
    assert type(again.activation_fn) is type(activation)
    np.testing.assert_allclose(again.predict(PAIRS), scores, rtol=0, atol=1e-6)
    logits = torch.from_numpy(logits_by_transformers(tmp_path / "saved"))
    np.testing.assert_allclose(activation(logits), scores, rtol=0, atol=1e-5)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_models_that_sentence_transformers_saved(directory: Path, tmp_path: Path):
    peer = PeerCrossEncoder(
        str(directory), device="cpu", max_length=20, activation_fn=nn.Identity()
    )
    peer.save_pretrained(str(tmp_path))
    ours = CrossEncoder(tmp_path, device="cpu")
    assert ours.max_length == 20
    assert isinstance(ours.activation_fn, nn.Identity)
    np.testing.assert_allclose(ours.predict(PAIRS), peer.predict(PAIRS), rtol=1e-5, atol=1e-5)


def test_the_default_prompt_is_theirs_and_stays_through_a_save(directory: Path, tmp_path: Path):
    prompts = {"question": "the capital of ", "none": ""}
    peer = PeerCrossEncoder(
        str(directory), device="cpu", prompts=prompts, default_prompt_name="question"
    )
    peer.save_pretrained(str(tmp_path / "theirs"))
    ours = CrossEncoder(tmp_path / "theirs", device="cpu")
    expected = peer.predict(PAIRS)
    assert np.abs(ours.predict(PAIRS, prompt="") - expected).max() > 1e-4
    np.testing.assert_allclose(ours.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        ours.score_tokens(ours.tokenize(PAIRS)), expected, rtol=1e-5, atol=1e-5
    )
    ours.save_pretrained(tmp_path / "ours")
    again = PeerCrossEncoder(str(tmp_path / "ours"), device="cpu")
    assert (again.prompts["question"], again.default_prompt_name) == ("the capital of ", "question")
    np.testing.assert_allclose(again.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)


def test_the_prompts_of_an_embedder_are_not_the_rerankers(directory: Path, tmp_path: Path):
    CrossEncoder(directory, device="cpu").save_pretrained(tmp_path)
    file = tmp_path / "config_sentence_transformers.json"
    saved = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "query: "},
        "default_prompt_name": "query",
    }
    file.write_text(json.dumps(saved))
    assert CrossEncoder(tmp_path, device="cpu").default_prompt_name is None
    file.write_text(json.dumps(saved | {"model_type": "CrossEncoder", "prompts": {}}))
    with pytest.raises(ValueError, match="names the default prompt query, but has"):
        CrossEncoder(tmp_path, device="cpu")


def test_a_head_beside_the_hugging_face_model_is_not_replaced_by_a_fresh_one(tmp_path: Path):
    make_tiny_bert(tmp_path, head=False)
    modules = [
        {"type": f"sentence_transformers.{name}"} for name in ("Transformer", "Pooling", "Dense")
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    with pytest.raises(ValueError, match="expected a path for the module"):
        CrossEncoder(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {
            "sentence_transformers": {
                "activation_fn": "torch.nn.modules.linear.Identity",
                "version": "4.1.0",
            }
        },
    ],
)
def test_activations_of_older_sentence_transformers(tmp_path: Path, config: dict):
    make_tiny_bert(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert isinstance(CrossEncoder(tmp_path).activation_fn, nn.Identity)
    assert isinstance(PeerCrossEncoder(str(tmp_path)).activation_fn, nn.Identity)


def test_a_config_does_not_choose_code_to_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_tiny_bert(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text('{"activation_fn": "os.system"}')
    assert isinstance(CrossEncoder(tmp_path).activation_fn, nn.Sigmoid)
    assert "os.system" in caplog.text


def test_an_activation_that_a_saved_model_can_not_name(model: CrossEncoder, tmp_path: Path, caplog):
    model.activation_fn = torch.sin
    model.save_pretrained(tmp_path)
    assert "is not one of torch.nn: the saved model opens with Sigmoid" in caplog.text


def test_a_bare_encoder_gets_a_head_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    make_tiny_bert(tmp_path / "encoder", head=False)
    with caplog.at_level(logging.WARNING):
        model = CrossEncoder(tmp_path / "encoder")
    assert len(caplog.records) == 1
    assert "no trained score head" in caplog.records[0].message
    assert model.num_labels == 1
    caplog.clear()
    model.save_pretrained(tmp_path / "saved")
    CrossEncoder(tmp_path / "saved")
    assert not caplog.records


def test_dtype_of_the_weights(directory: Path):
    model = CrossEncoder(directory, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.predict(PAIRS).dtype == np.float32


def test_what_can_not_be_opened(tmp_path: Path, directory: Path):
    with pytest.raises(ValueError, match="expected num_labels=1, got 3"):
        CrossEncoder(directory, num_labels=3)
    with pytest.raises(ValueError, match="has 2 labels"):
        CrossEncoder(make_tiny_bert(tmp_path / "two", num_labels=2))
    with pytest.raises(ValueError, match="does not exist"):
        CrossEncoder(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no local directory, and the hub is switched off"):
        CrossEncoder("somebody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        CrossEncoder(tmp_path / "empty")


def test_pickled_weights_are_never_loaded(tmp_path: Path):
    make_tiny_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return Path.touch, (marker,)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        CrossEncoder(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "b"), "rain"], "pair 1: expected"),
        ([("a", "b", "c")], "pair 0: expected"),
        ([("a", "b"), ("a", None)], "pair 1, document: expected a string, got NoneType None"),
        ([(1, "b")], "pair 0, query: expected a string, got int 1"),
        ([{"query": "a", "document": "b"}], "pair 0: expected"),
    ],
)
def test_bad_pairs_are_named(model: CrossEncoder, pairs: list, message: str):
    with pytest.raises(ValueError, match=message):
        model.predict(pairs)


def test_batch_size_below_one(model: CrossEncoder):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.predict(PAIRS, batch_size=0)


def test_a_saved_model_is_replaced_only_when_asked(model: CrossEncoder, tmp_path: Path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already holds a model"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't write a model"):
        model.save_pretrained(tmp_path / "file")
    assert not list(tmp_path.glob(".saving-*"))


def test_the_published_usage_snippet(directory: Path):
    from rerank_fast import CrossEncoder  # the one line that changes

    model = CrossEncoder(str(directory))
    pairs = [
        ["what is the difference between paris and berlin", "paris is the capital of france."],
        ["what is the difference between paris and berlin", "berlin is a city of museums."],
    ]
    scores = model.predict(pairs)
    assert scores.shape == (2,)
    ranks = model.rank(
        "what is the difference between paris and berlin", [pair[1] for pair in pairs]
    )
    assert sorted(hit["corpus_id"] for hit in ranks) == [0, 1]


def test_rank_many_is_rank_for_each_query(model: CrossEncoder):
    queries = ["what is a panda", "capital of france", "weather"]
    documents = [["a panda is a bear", "a fish", "no"], [], ["rain and wind", "paris"]]
    rankings = model.rank_many(queries, documents, top_k=2, return_documents=True)
    for query, docs, ranking in zip(queries, documents, rankings, strict=True):
        alone = model.rank(query, docs, top_k=2, return_documents=True)
        assert [entry["corpus_id"] for entry in ranking] == [entry["corpus_id"] for entry in alone]
        assert [entry["text"] for entry in ranking] == [entry["text"] for entry in alone]
        scores = ([entry["score"] for entry in ranking], [entry["score"] for entry in alone])
        np.testing.assert_allclose(*scores, rtol=1e-5)
    assert model.rank_many([], []) == []


def test_arrays_and_generators_of_texts_are_ranked(model: CrossEncoder):
    expected = model.rank(QUERY, PASSAGES)
    assert model.rank(QUERY, (passage for passage in PASSAGES)) == expected
    assert model.rank_many(np.array([QUERY]), [PASSAGES]) == [expected]


@pytest.mark.parametrize(
    ("queries", "documents", "message"),
    [
        (["a", "b"], [["c"]], "2 queries and 1 lists"),
        ("a", [["c"]], "expected a list of queries, got str 'a'"),
        (["a", "b"], [["c"], "d"], "query 1: expected a list of documents, got str 'd'"),
        (["a"], [["c", 3]], "query 0, document 1: expected a string, got int 3"),
    ],
)
def test_rank_many_says_what_is_wrong(model: CrossEncoder, queries, documents, message: str):
    with pytest.raises(ValueError, match=message):
        model.rank_many(queries, documents)


def test_pairs_beyond_one_chunk_are_tokenised_ahead_in_order(model: CrossEncoder, monkeypatch):
    pairs = [(f"query {n % 7}", f"document {'fish ' * (n % 11)}{n}") for n in range(53)]
    expected = model.predict(pairs)
    monkeypatch.setattr("rerank_fast.model.tokens.tokenization.CHUNK", 8)
    np.testing.assert_allclose(model.predict(pairs), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="pair 53, document: expected a string"):
        model.predict([*pairs, ("query", None)])


def test_dtype_auto_is_what_multiplies_fastest(directory: Path, monkeypatch, caplog):
    exact = CrossEncoder(directory, device="cpu")
    for bf16_seconds, dtype in ((0.5, torch.bfloat16), (2.0, torch.float32)):
        seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
        monkeypatch.setattr("rerank_fast.model.precision.hardware.product_seconds", seconds.get)
        with caplog.at_level(logging.INFO):
            model = CrossEncoder(directory, device="cpu", dtype="auto")
        assert f"dtype auto: {str(dtype).removeprefix('torch.')} on cpu" in caplog.text
        assert next(model.parameters()).dtype == dtype
        np.testing.assert_allclose(model.predict(PAIRS), exact.predict(PAIRS), atol=2e-2)


def test_the_measurement_of_dtype_auto_is_short_and_made_once():
    product_seconds.cache_clear()
    started = time.thread_time()  # of this thread alone: others may hold the cores
    first = product_seconds(torch.bfloat16), product_seconds(torch.float32)
    assert time.thread_time() - started < 1  # some milliseconds
    assert (product_seconds(torch.bfloat16), product_seconds(torch.float32)) == first


@pytest.mark.parametrize("dtype", ["int7", "Tensor", "no such"])
def test_dtypes_that_there_are_not(directory: Path, dtype: str):
    with pytest.raises(ValueError, match="dtype must be"):
        CrossEncoder(directory, dtype=dtype)


def test_empty_texts_score_as_sentence_transformers_scores_them(
    directory: Path, model: CrossEncoder
):
    pairs = [("rain", ""), ("", "rain"), ("", ""), ("rain", " ")]
    peer = PeerCrossEncoder(str(directory), device="cpu")
    np.testing.assert_allclose(model.predict(pairs), peer.predict(pairs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory"
        ),
        MemoryError("std::bad_alloc"),
    ],
    ids=["cuda", "cpu", "kernel"],
)
def test_a_batch_that_does_not_fit_memory_is_halved_once(
    model: CrossEncoder, monkeypatch, caplog, error
):
    expected = model.predict(PAIRS)
    scored: list[int] = []
    fits = 3

    def call(step: PackedPairs, indices: np.ndarray) -> torch.Tensor:
        if len(indices) > fits:
            raise error
        scored.append(len(indices))
        return whole(step, indices)

    whole = PackedPairs.__call__
    monkeypatch.setattr(PackedPairs, "__call__", call)
    np.testing.assert_allclose(model.predict(PAIRS), expected, rtol=1e-5)
    assert scored == [3, 3]
    assert [record.message for record in caplog.records] == [
        "A batch of 6 pairs with 136 tokens does not fit memory; it is scored in two halves."
    ]
    fits = 2
    with pytest.raises(
        MemoryError, match=r"batch of 6 pairs with 136 tokens, in halves too, does not fit memory"
    ):
        model.predict(PAIRS)
    fits = 0
    with pytest.raises(MemoryError, match="batch of 1 pairs"):
        model.predict(PAIRS[:1])


def test_other_errors_are_not_taken_for_memory(model: CrossEncoder, monkeypatch):
    def call(step: PackedPairs, indices: np.ndarray) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(PackedPairs, "__call__", call)
    with pytest.raises(RuntimeError, match="something else"):
        model.predict(PAIRS)

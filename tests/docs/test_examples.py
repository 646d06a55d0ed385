"""docs/examples/, run: with the packages that they are for, on a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rerank_fast import CrossEncoder, Trainer, TrainingConfig
from tests.model_factory import make_tiny_bert
from tests.training.conftest import make_lists

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
# Of PyPI, each example's; where they are absent its test skips.
NEEDS = {
    "langchain_reranker": "langchain_classic",
    "llama_index_reranker": "llama_index.core",
    "haystack_reranker": "haystack",
}
QUERY = "what do pandas eat"
TEXTS = ["The sea is wet.", "A panda eats bamboo all day.", "Paris is the capital of France."]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with a tiny reranker, `bert`."""
    make_tiny_bert(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RERANKER", "bert")
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    return tmp_path


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example as a script; what it has defined."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_each_example_is_run_and_shown():
    tested = Path(__file__).read_text()
    page = (EXAMPLES.parent / "examples.md").read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f'"{file.stem}"' in tested, file
        assert f'--8<-- "docs/examples/{file.name}"' in page, file


def test_the_published_run(work: Path, monkeypatch: pytest.MonkeyPatch):
    """On MS MARCO's and NanoBEIR's files and on lists, with the settings that were published."""
    seen: list[TrainingConfig] = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (seen.append(self.config), train(self))[1])
    rows = make_lists(40).map(lambda row, i: {"query": f"{row['query']} {i}"}, with_indices=True)
    rows.to_json("lists.jsonl")
    line = ["--model", "bert", "--lists", "lists.jsonl", "--output", "out"]
    names = run("published_run", line, monkeypatch)
    assert len(names["evaluation"]) == 4
    assert names["result"].steps == 3  # of 16, 16 and 4 lists
    assert names["result"].metrics["ndcg@10"] > 0
    published = dict(
        scheme="ndcg2pp", precision="bf16", learning_rate=2e-5, warmup_ratio=0.1, num_epochs=1,
        seed=12, batch_size=16, eval_steps=500, load_best=True, schedule="linear",
    )  # fmt: skip
    assert {name: getattr(seen[0], name) for name in published} == published
    CrossEncoder("out")


def test_its_own_data(work: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {
            "query": f"{row['query']} {i}",
            "passages": {
                "passage_text": row["docs"],
                "is_selected": [int(label) for label in row["labels"]],
            },
        }
        for i, row in enumerate(make_lists(1040))
    ]
    Path("marco").mkdir()
    Path("marco", "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_nano_beir(Path("nano"))
    line = ["--model", "bert", "--ms_marco", "marco", "--nano_beir", "nano", "--output", "out"]
    names = run("published_run", line, monkeypatch)
    assert len(names["evaluation"]) == 1000
    assert names["result"].steps == 3
    assert names["best"] == "NanoBEIR_R100_mean_ndcg@10"
    assert {names["best"], "eval_ndcg@10"} <= {*names["result"].metrics}


def write_nano_beir(directory: Path) -> None:
    parts = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)],
        "queries": [{"_id": "q", "text": QUERY}],
        "qrels": [{"query-id": "q", "corpus-id": "d1"}],
        "bm25": [{"query-id": "q", "corpus-ids": ["d0", "d1", "d2"]}],
    }
    for part, rows in parts.items():
        (directory / part).mkdir(parents=True)
        for name in ("NanoMSMARCO", "NanoNFCorpus", "NanoNQ"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / part / f"{name}.jsonl").write_text(lines)


def test_own_lists(work: Path, monkeypatch: pytest.MonkeyPatch):
    names = run("own_lists", ["bert"], monkeypatch)
    assert names["result"].steps == 3
    assert names["best"]["text"] in ("bamboo", "fish")
    assert len(Path("lists.jsonl").read_text().splitlines()) == 3


def test_own_loop(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    make_lists(640).to_json("train.jsonl")
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda weights, lr, build=torch.optim.AdamW: build(weights, lr=1e-3)
    )
    run("own_loop", ["train.jsonl", "bert"], monkeypatch)
    quality = [float(one) for one in re.findall(r"ndcg@10 (\S+)", capsys.readouterr().out)]
    assert len(quality) == 40
    assert sum(quality[-5:]) > sum(quality[:5]) + 0.5  # it learns
    assert Path("my-reranker", "model.safetensors").exists()


def test_loss_alone(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    run("loss_alone", [], monkeypatch)
    quality = [float(one) for one in re.findall(r"ndcg@10 (\S+)", capsys.readouterr().out)]
    assert quality[0] < 0.7 < 0.85 < quality[-1]


@pytest.fixture
def service(work: Path) -> Any:
    pytest.importorskip("fastapi")
    return runpy.run_path(str(EXAMPLES / "rerank_service.py"))


@pytest.fixture
def client(service: Any) -> Any:
    from fastapi.testclient import TestClient

    return TestClient(service["app"], raise_server_exceptions=False)


def test_the_service_answers_in_coheres_schema(client: Any):
    """This is the "rerank_service"."""
    request = {"model": "bert", "query": QUERY, "documents": TEXTS, "top_n": 2}
    answer = client.post("/rerank", json=request)
    assert answer.status_code == 200
    assert set(answer.json()) == {"id", "results", "meta"}
    expected = CrossEncoder("bert").rank(QUERY, TEXTS, activation_fn=torch.nn.Sigmoid())
    results = answer.json()["results"]
    assert [set(one) for one in results] == [{"index", "relevance_score"}] * 2
    assert [one["index"] for one in results] == [hit["corpus_id"] for hit in expected[:2]]
    for one, hit in zip(results, expected, strict=False):
        assert one["relevance_score"] == pytest.approx(hit["score"], abs=1e-6)
        assert 0 <= one["relevance_score"] <= 1
    # Documents as objects, all of them, and their texts back.
    request = {
        "query": QUERY, "documents": [{"text": one} for one in TEXTS], "return_documents": True
    }  # fmt: skip
    results = client.post("/v1/rerank", json=request).json()["results"]
    assert [one["document"]["text"] for one in results] == [TEXTS[one["index"]] for one in results]
    assert len(results) == 3


@pytest.mark.parametrize(
    ("changed", "status", "said"),
    [
        ({"query": ""}, 422, "body.query"),
        ({"query": None}, 422, "body.query"),
        ({"documents": []}, 422, "body.documents"),
        ({"documents": "a text"}, 422, "body.documents"),
        ({"documents": ["a", 3]}, 422, "body.documents.1"),
        ({"documents": ["a"] * 1001}, 422, "body.documents"),
        ({"top_n": 0}, 422, "body.top_n"),
        ({"model": "another"}, 422, "body.model: Input should be 'bert'"),
    ],
)
def test_the_service_says_what_is_wrong(
    changed: dict[str, Any], status: int, said: str, client: Any
):
    request = {"query": QUERY, "documents": TEXTS, **changed}
    answer = client.post("/rerank", json=request)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["message"]


def test_text_that_is_no_unicode_is_the_clients_fault(client: Any):
    for body in (rb'{"query": "\ud800", "documents": ["a"]}', b"{", b"\xff"):
        answer = client.post("/rerank", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


def test_requests_that_wait_are_ranked_together(service: Any, monkeypatch: pytest.MonkeyPatch):
    """Each gets its own answer, and a call that fails fails those that it was for alone."""
    calls: list[int] = []
    rank_many = service["model"].rank_many

    def counted(queries: list[str], lists: list[list[str]], **options: Any) -> Any:
        calls.append(len(queries))
        if "break" in queries:
            raise RuntimeError("broken")
        return rank_many(queries, lists, **options)

    monkeypatch.setattr(service["model"], "rank_many", counted)

    async def all_at_once() -> list[Any]:
        rank = service["rank"]
        first = [rank(QUERY, TEXTS[: 1 + i % 3]) for i in range(40)]
        answers = await asyncio.gather(*first)
        (error,) = await asyncio.gather(rank("break", TEXTS), return_exceptions=True)
        assert isinstance(error, RuntimeError)
        return [*answers, await rank(QUERY, TEXTS)]

    *answers, last = asyncio.run(all_at_once())
    assert [len(one) for one in answers] == [1 + i % 3 for i in range(40)]
    assert len(last) == 3
    assert calls == [1, 32, 7, 1, 1]
    assert not service["waiting"]


def test_many_clients(client: Any):
    def ask(i: int) -> int:
        request = {"query": QUERY, "documents": TEXTS[: 1 + i % 3]}
        return len(client.post("/rerank", json=request).json()["results"])

    with client, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(24))) == [1 + i % 3 for i in range(24)]


@pytest.mark.parametrize("name", NEEDS)
def test_it_reranks_in_other_libraries(
    name: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    pytest.importorskip(NEEDS[name])
    names = run(name, [], monkeypatch)
    hits = CrossEncoder("bert").rank(QUERY, TEXTS, top_k=2)
    lines = capsys.readouterr().out.splitlines()
    for line, hit in zip(lines, hits, strict=True):
        assert line.endswith(TEXTS[hit["corpus_id"]])
        if name != "langchain_reranker":
            assert float(line.split()[0]) == pytest.approx(hit["score"], abs=1e-4)
    if name == "llama_index_reranker":
        assert names["reranker"].postprocess_nodes([], query_str=QUERY) == []
        with pytest.raises(ValueError, match="expected a query"):
            names["reranker"].postprocess_nodes(names["nodes"])
    if name == "haystack_reranker":
        again = names["pipeline"].to_dict()["components"]["reranker"]["init_parameters"]
        assert again == {"model": "bert", "top_k": 2}

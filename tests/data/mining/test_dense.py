"""Embeddings: any encoder, prompts, and the cache that later and interrupted runs read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rerank_fast.data.mining import BM25Retriever, DenseRetriever
from tests.data.mining.stubs import FixedEncoder
from tests.full_disk import files_up_to

CORPUS = [f"document {i}" for i in range(50)]
QUERIES = [f"query {i}" for i in range(9)]


class Hashed(nn.Module):
    """Embeds a text by its letters, with weights of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(256, 6)
        self.seen: list[str] = []

    def forward(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        return torch.stack([self.table(torch.tensor(list(text.encode()))).sum(0) for text in texts])


def search(retriever: DenseRetriever, k: int = 5) -> Any:
    retriever.index(CORPUS, QUERIES, show_progress_bar=False)
    return retriever.search(2, 9, k, [[i, 3] for i in range(7)])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["array", "tensor", "list", "model"])
def test_any_encoder(similarity: Any, kind: str) -> None:
    table = FixedEncoder([*CORPUS, *QUERIES]).table
    encoders: dict[str, Any] = {
        "array": lambda texts: np.stack([table[text] for text in texts]),
        "tensor": lambda texts: torch.stack([torch.from_numpy(table[text]) for text in texts]),
        "list": lambda texts: [table[text].tolist() for text in texts],
        "model": FixedEncoder([*CORPUS, *QUERIES]),
    }
    found = search(DenseRetriever(encoders[kind], similarity=similarity))
    documents, queries = (
        np.stack([table[text] for text in texts]) for texts in (CORPUS, QUERIES[2:])
    )
    if similarity == "cosine":
        documents, queries = (
            rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (documents, queries)
        )
    scores = queries @ documents.T
    np.testing.assert_array_equal(found.indices, np.argsort(-scores, axis=1)[:, :5])
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :5], rtol=1e-5, atol=1e-6)
    for row, positive_scores in enumerate(found.positive_scores):
        np.testing.assert_allclose(positive_scores, scores[row, [row, 3]], rtol=1e-5, atol=1e-6)


def test_prompts_go_before_the_texts() -> None:
    encoder = Hashed()
    search(DenseRetriever(encoder, query_prompt="query: ", corpus_prompt="passage: "))
    assert encoder.seen == ["passage: " + text for text in CORPUS] + [
        "query: " + text for text in QUERIES
    ]


def test_prompts_of_a_model_are_passed_to_it() -> None:
    class Model(FixedEncoder):
        def encode_query(self, texts: list[str], **options: Any) -> np.ndarray:
            asked.append(("query", options.get("prompt"), options.get("batch_size")))
            return self.encode(texts)

        def encode_document(self, texts: list[str], **options: Any) -> np.ndarray:
            asked.append(("document", options.get("prompt"), options.get("batch_size")))
            return self.encode(texts)

    asked: list[Any] = []
    search(DenseRetriever(Model([*CORPUS, *QUERIES]), query_prompt="q: ", batch_size=4))
    assert asked == [("document", None, 4), ("query", "q: ", 4)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_are_kept_and_read_back(tmp_path: Path, dtype: Any) -> None:
    expected = search(DenseRetriever(Hashed()))
    first = search(DenseRetriever(Hashed(), cache_folder=tmp_path, embedding_dtype=dtype))
    files = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert [name.split("_")[0] for name in sorted(files)] == ["document", "query"]
    assert {np.load(tmp_path / name).dtype for name in files} == {np.dtype(dtype)}
    encoder = Hashed()
    retriever = DenseRetriever(encoder, cache_folder=tmp_path, embedding_dtype=dtype)
    again = search(retriever)
    assert encoder.seen == []
    assert isinstance(retriever._corpus, np.memmap)
    np.testing.assert_array_equal(first.scores, again.scores)
    np.testing.assert_allclose(
        first.scores, expected.scores, atol=1e-7 if dtype == "float32" else 5e-4
    )
    assert files == {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": Hashed(seed=1)},
        {"corpus_prompt": "passage: ", "query_prompt": "query: "},
        {"embedding_dtype": "float16"},
        {"similarity": "dot"},
    ],
)
def test_what_changes_embeddings_has_its_own_cache(tmp_path: Path, changes: dict[str, Any]) -> None:
    search(DenseRetriever(Hashed(), cache_folder=tmp_path))
    search(DenseRetriever(**{"encoder": Hashed(), "cache_folder": tmp_path, **changes}))
    assert len(list(tmp_path.iterdir())) == 4
    assert search(DenseRetriever(**{"encoder": Hashed(), **changes})) is not None


def test_interrupted_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerank_fast.data.mining.embeddings._BLOCK", 8)

    class Stops(Hashed):
        def forward(self, texts: list[str]) -> torch.Tensor:
            if len(self.seen) >= 32:
                raise KeyboardInterrupt
            return super().forward(texts)

    Stops.__qualname__ = Hashed.__qualname__
    with pytest.raises(KeyboardInterrupt):
        search(DenseRetriever(Stops(), cache_folder=tmp_path))
    encoder = Hashed()
    found = search(DenseRetriever(encoder, cache_folder=tmp_path))
    assert encoder.seen == CORPUS[32:] + QUERIES
    np.testing.assert_array_equal(found.scores, search(DenseRetriever(Hashed())).scores)
    assert all(file.suffix == ".npy" for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (np.zeros(50), r"gave \(50,\) for 50 texts, expected \(50, d\)"),
        (np.zeros((49, 4)), r"gave \(49, 4\) for 50 texts, expected \(50, 4\)"),
        (np.full((50, 4), np.nan), "not finite"),
    ],
)
def test_an_encoder_that_gives_no_embeddings(output: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(DenseRetriever(lambda texts: output))


def test_wrong_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for options, message in (
        ({"similarity": "l2"}, "similarity must be cosine or dot"),
        ({"embedding_dtype": "int8"}, "embedding_dtype must be float32 or float16"),
        ({"encoder": lambda texts: texts, "cache_folder": tmp_path}, "needs an encoder_name"),
    ):
        with pytest.raises(ValueError, match=message):
            DenseRetriever(**{"encoder": Hashed(), **options})
    DenseRetriever(lambda texts: texts, cache_folder=tmp_path, encoder_name="mine")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        DenseRetriever(Hashed(), use_faiss=True)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ValueError, match=r"pip install 'rerank-fast\[mine\]'"):
        BM25Retriever()


def test_a_corpus_without_terms() -> None:
    with pytest.raises(ValueError, match="none of the 2 documents has a term"):
        BM25Retriever().index(["the", "..."], ["query"], show_progress_bar=False)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{}"])
def test_a_damaged_cache_is_named(tmp_path: Path, content: bytes) -> None:
    search(DenseRetriever(Hashed(), cache_folder=tmp_path))
    file = next(tmp_path.glob("document_embeddings_*.npy"))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"embeddings in {file} are damaged, remove the file"):
        search(DenseRetriever(Hashed(), cache_folder=tmp_path))


@pytest.mark.parametrize(
    "content", ["", "{}", '{"done": "3"}', '{"done": -1}', '{"done": 51}', "[3]"]
)
def test_a_damaged_note_of_an_interrupted_run_is_named(tmp_path: Path, content: str) -> None:
    search(DenseRetriever(Hashed(), cache_folder=tmp_path))
    file = next(tmp_path.glob("document_embeddings_*.npy"))
    part = file.rename(file.with_name(f"{file.name}.part"))
    part.with_name(f"{part.name}.json").write_text(content)
    with pytest.raises(ValueError, match=rf"interrupted run in {part} are damaged, remove it and"):
        search(DenseRetriever(Hashed(), cache_folder=tmp_path))


def test_a_full_disk_is_said_before_anything_is_written_to_a_map(tmp_path: Path) -> None:
    """A write to a map of blocks that the disk does not have would end the process."""
    with (
        files_up_to(200),
        pytest.raises(ValueError, match=r"can't write \S*document_embeddings_\w+\.npy\.part: "),
    ):
        search(DenseRetriever(Hashed(), cache_folder=tmp_path))
    found = search(DenseRetriever(Hashed(), cache_folder=tmp_path))
    np.testing.assert_array_equal(found.indices, search(DenseRetriever(Hashed())).indices)

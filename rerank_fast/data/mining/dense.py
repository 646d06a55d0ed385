"""Exact search over embeddings, in blocks of the corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rerank_fast.data.mining.embeddings import embed
from rerank_fast.data.mining.retrieval import Found, model_fingerprint, text_fingerprint
from rerank_fast.model.devices import choose_device

_SIMILARITIES = 1 << 25  # (queries × documents of a block) held at a time: 128 MiB


class DenseRetriever:
    """Nearest neighbours by the embeddings of any encoder.

    Args:
        encoder: a sentence-transformers model (`encode_query` and `encode_document`, or `encode`),
            or any callable that takes a list of texts and gives their embeddings (texts, d) as an
            array or a tensor.
        similarity: "cosine" or "dot".
        query_prompt: put before each query; None leaves it to the encoder.
        corpus_prompt: put before each document; None leaves it to the encoder.
        batch_size: texts per forward pass of a sentence-transformers model; None takes its default.
        cache_folder: where embeddings are kept between runs, as .npy files that are read through a
            memory map, named by a hash of the encoder's weights, the prompt, the similarity and the
            texts.
        encoder_name: names an encoder without torch weights in that hash.
        embedding_dtype: "float32", or "float16" for half the disk and memory; a cosine similarity
            then differs by up to about 5e-4. Similarities are computed in fp32 either way.
        use_faiss: search with FAISS's IndexFlatIP instead of torch; its fp32 copy of the corpus
            stays in memory.
        device: of torch's search; None takes CUDA where there is one, else the CPU.

    Raises:
        ValueError: an option has no such value; the encoder is no encoder; a cache without a name
            for the encoder; FAISS is asked for and not installed.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        similarity: Literal["cosine", "dot"] = "cosine",
        query_prompt: str | None = None,
        corpus_prompt: str | None = None,
        batch_size: int | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        encoder_name: str | None = None,
        embedding_dtype: Literal["float32", "float16"] = "float32",
        use_faiss: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        if similarity not in ("cosine", "dot"):
            raise ValueError(f"similarity must be cosine or dot, got {similarity!r}")
        if embedding_dtype not in ("float32", "float16"):
            raise ValueError(f"embedding_dtype must be float32 or float16, got {embedding_dtype!r}")
        if not callable(encoder) and not hasattr(encoder, "encode"):
            raise ValueError(f"expected an encoder or a callable, got {type(encoder).__name__}")
        if cache_folder is not None and encoder_name is None and not isinstance(encoder, nn.Module):
            raise ValueError(
                "cache_folder with an encoder that is no torch module needs an encoder_name"
            )
        if use_faiss:
            _import_faiss()
        self.encoder = encoder
        self.similarity = similarity
        self.prompts = {"query": query_prompt, "document": corpus_prompt}
        self.batch_size = batch_size
        self.cache_folder = Path(cache_folder) if cache_folder is not None else None
        self.embedding_dtype = embedding_dtype
        self.use_faiss = use_faiss
        self.device = choose_device(device)
        self._fingerprint = model_fingerprint(encoder, encoder_name)

    def settings(self) -> dict[str, Any]:
        return {
            "retriever": self._fingerprint,
            "similarity": self.similarity,
            "query_prompt": self.prompts["query"],
            "corpus_prompt": self.prompts["document"],
            "embedding_dtype": self.embedding_dtype,
        }

    def index(
        self, corpus: Sequence[str], queries: Sequence[str], *, show_progress_bar: bool
    ) -> None:
        self._corpus = self._embed(corpus, "document", show_progress_bar)
        self._queries = self._embed(queries, "query", show_progress_bar)
        self._faiss: Any = None
        if self.use_faiss:
            self._faiss = _import_faiss().IndexFlatIP(self._corpus.shape[1])
            for start in range(0, len(self._corpus), 1 << 16):
                self._faiss.add(
                    np.ascontiguousarray(self._corpus[start : start + (1 << 16)], np.float32)
                )

    def _embed(self, texts: Sequence[str], kind: str, show_progress_bar: bool) -> np.ndarray:
        cache = None
        if self.cache_folder is not None:
            self.cache_folder.mkdir(parents=True, exist_ok=True)
            settings = (
                self._fingerprint,
                kind,
                self.prompts[kind],
                self.similarity,
                self.embedding_dtype,
            )
            key = text_fingerprint([repr(settings), text_fingerprint(texts)])
            cache = self.cache_folder / f"{kind}_embeddings_{key}.npy"
        return embed(
            texts,
            partial(self._encode, kind=kind),
            normalize=self.similarity == "cosine",
            dtype=self.embedding_dtype,
            cache=cache,
            description="Encoding the corpus" if kind == "document" else "Encoding the queries",
            show_progress_bar=show_progress_bar,
        )

    @torch.inference_mode()
    def _encode(self, texts: list[str], kind: str) -> Any:
        prompt = self.prompts[kind]
        # The encoder's own method for the kind knows its prompts.
        method = getattr(self.encoder, f"encode_{kind}", None) or getattr(
            self.encoder, "encode", None
        )
        if method is None:
            return self.encoder([prompt + text for text in texts] if prompt else texts)
        options: dict[str, Any] = {"show_progress_bar": False, "convert_to_numpy": True}
        options |= {"prompt": prompt} if prompt else {}
        options |= {"batch_size": self.batch_size} if self.batch_size else {}
        return method(texts, **options)

    @torch.inference_mode()
    def search(self, start: int, stop: int, k: int, positives: Sequence[Sequence[int]]) -> Found:
        # A copy: the memory map is read-only.
        queries = np.array(self._queries[start:stop], np.float32)
        positive_scores = [
            np.asarray(self._corpus[list(relevant)], np.float32) @ query
            for query, relevant in zip(queries, positives, strict=True)
        ]
        if self._faiss is not None:
            scores, indices = self._faiss.search(queries, k)
            return Found(
                indices, np.where(indices < 0, np.float32(-np.inf), scores), positive_scores
            )
        top_scores, top_indices = self._exact(torch.from_numpy(queries).to(self.device), k)
        return Found(top_indices.cpu().numpy(), top_scores.cpu().numpy(), positive_scores)

    def _exact(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(Q, k) scores and indices of the best documents; k is at most their number."""
        block = max(k, _SIMILARITIES // len(queries))
        scores = queries.new_empty((len(queries), 0))
        indices = torch.empty((len(queries), 0), dtype=torch.long, device=queries.device)
        for start in range(0, len(self._corpus), block):
            documents = (
                torch.from_numpy(np.array(self._corpus[start : start + block]))
                .to(self.device)
                .float()
            )
            here, local = torch.topk(queries @ documents.T, min(k, len(documents)), dim=1)
            scores, indices = torch.cat([scores, here], 1), torch.cat([indices, local + start], 1)
            if start:
                scores, kept = torch.topk(scores, min(k, scores.shape[1]), dim=1)
                indices = indices.gather(1, kept)
        return scores, indices


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError("use_faiss needs FAISS: pip install faiss-cpu") from error
    return faiss

"""MTEB's interface, with the real package: a reranking task from texts in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from torch import nn

from rerank_fast import CrossEncoder
from tests.model_factory import make_tiny_bert

mteb = pytest.importorskip("mteb")

QUERIES = {"q1": "what is a panda", "q2": "rain in paris"}
DOCUMENTS = {
    "d1": "a bear",
    "d2": "the sea",
    "d3": "a panda is a kind of bear",
    "d4": "the wind and the rain",
}
RANKED = {"q1": ["d3", "d1", "d2"], "q2": ["d2", "d4"]}


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_their_search_scores_each_pair(batch_size: int, tmp_path: Path):
    from mteb.models import CrossEncoderProtocol
    from mteb.models.search_wrappers import SearchCrossEncoderWrapper

    from rerank_fast.model.protocols.mteb import MTEBCrossEncoder

    model = CrossEncoder(make_tiny_bert(tmp_path / "model"), device="cpu")
    adapter = MTEBCrossEncoder(model)
    assert isinstance(adapter, CrossEncoderProtocol)
    assert adapter.mteb_model_meta.name == "local/model"
    task = mteb.get_task("AskUbuntuDupQuestions").metadata  # for its kind: nothing is downloaded
    search = SearchCrossEncoderWrapper(adapter)
    options = {"task_metadata": task, "hf_split": "test", "hf_subset": "default"}
    options["encode_kwargs"] = {"batch_size": batch_size}
    corpus = Dataset.from_dict(
        {"id": list(DOCUMENTS), "text": list(DOCUMENTS.values()), "title": [""] * 4}
    )
    search.index(corpus, **options)
    queries = Dataset.from_dict({"id": list(QUERIES), "text": list(QUERIES.values())})
    found = search.search(queries, top_k=3, top_ranked=RANKED, **options)
    for query, documents in RANKED.items():
        pairs = [(QUERIES[query], DOCUMENTS[document]) for document in documents]
        expected = model.predict(pairs, activation_fn=nn.Identity())
        np.testing.assert_allclose(
            [found[query][one] for one in documents], expected, rtol=1e-5, atol=1e-6
        )

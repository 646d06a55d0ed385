"""predict() in the fastest dtype that keeps NDCG@10 within 0.005 of fp32's, beside int8 engines.

    pytest benchmarks/steps/test_fastest_predict.py -m slow --benchmark-only
    ... --reranker my-reranker --lists lists.jsonl

NDCG@10 is of --lists by --reranker. Without them of documentation that is held out, by MiniLM-L6
after 60 short steps on other modules' (the demo's task).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from benchmarks.steps import engines
from benchmarks.steps.engines import Pairs
from benchmarks.steps.test_predict import HAS_BF16, describe, make_pairs
from rerank_fast import CrossEncoder, Trainer, TrainingConfig, ndcg
from rerank_fast.data import load_lists
from rerank_fast.data.docstrings import build_docstring_lists
from rerank_fast.demo import encoder_directory

LOSS = 0.005  # of NDCG@10 that a dtype may cost
LISTS = 120  # measured on


@pytest.fixture(scope="module")
def task(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Dataset]:
    """The directory of a reranker, and lists that it has not seen."""
    reranker, lists = (request.config.getoption(name) for name in ("reranker", "lists"))
    if (reranker is None) != (lists is None):
        raise pytest.UsageError("--reranker and --lists belong together")
    if reranker is not None:
        return reranker, load_lists(lists)
    train, held_out = build_docstring_lists(num_random=9, max_lists=480)
    output = str(tmp_path_factory.mktemp("reranker") / "model")
    config = TrainingConfig(
        output=output,
        max_length=64,
        learning_rate=3e-4,
        freeze_layers=2,
        batch_size=8,
        max_docs_per_list=5,
        max_steps=60,
        show_progress_bar=False,
    )
    Trainer(encoder_directory(), train, config=config).train()
    model = CrossEncoder(output, max_length=256)
    model.save_pretrained(output, overwrite=True)
    return output, held_out.select(range(min(LISTS, len(held_out))))


def ndcg_of(predict: Callable[[Pairs], np.ndarray], lists: Dataset) -> float:
    """Mean NDCG@10 of the lists."""
    pairs = [(row["query"], document) for row in lists for document in row["docs"]]
    labels = torch.tensor([label for row in lists for label in row["labels"]]).float()
    offsets = torch.tensor(np.cumsum([0, *(len(row["docs"]) for row in lists)]))
    scores = torch.from_numpy(np.asarray(predict(pairs), np.float32))
    return float(ndcg(scores, labels, offsets, 10).mean())


@pytest.mark.slow
def test_fastest_predict(interleaved, note, task: tuple[str, Dataset], tmp_path: Path) -> None:
    directory, lists = task
    raw = {"device": "cpu", "activation_fn": nn.Identity()}
    dtypes = ["float32", "int8", *(["bfloat16"] if HAS_BF16 else [])]
    models = {dtype: CrossEncoder(directory, dtype=dtype, **raw) for dtype in dtypes}
    ways = {dtype: model.predict for dtype, model in models.items()}
    exact, pairs = models["float32"], make_pairs()
    calibration = [(row["query"], document) for row in lists for document in row["docs"]]
    peers = {}
    for name, make in engines.INT8.items():
        try:
            peers[name] = make(exact, directory, calibration, tmp_path)
        except pytest.skip.Exception as missing:
            print(f"{name} is left out: {missing}")
    if not peers:
        pytest.skip("neither openvino with nncf nor onnxruntime is installed: [bench-int8]")
    quality = {name: ndcg_of(way, lists) for name, way in (ways | peers).items()}
    calls = {name: lambda way=way: way(pairs) for name, way in (ways | peers).items()}
    medians = interleaved(calls, rounds=3)
    kept = [dtype for dtype in dtypes if quality[dtype] >= quality["float32"] - LOSS]
    fastest = min(kept, key=lambda dtype: medians[dtype])
    texts = describe(exact, pairs)
    for name in [*peers, *(dtype for dtype in dtypes if dtype != fastest)]:
        note(
            f"predict fastest, peer {name}, {texts}",
            medians[fastest],
            medians[name],
            remark=f"ours {fastest}; NDCG@10 {quality[fastest]:.4f}, peer {quality[name]:.4f}, "
            f"fp32 {quality['float32']:.4f}",
        )

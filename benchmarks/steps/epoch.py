"""One epoch of the published recipe with this package and with sentence-transformers, one after the
other.

    python -m benchmarks.steps.epoch --train selqa-train.jsonl --eval noveleval.jsonl

Wall time is that of training: from lists and a loaded encoder to a saved model, tokenisation
included, evaluation and imports not. Each cuts a batch as it does by itself: this package by
tokens, sentence-transformers by --mini_batch_size, 16 in the published run. Both models are then
measured by the same evaluator. Nothing else should use the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset

from benchmarks.arguments import add_rows, make_parser
from benchmarks.results import Row, Run
from rerank_fast import CrossEncoder, Trainer, TrainingConfig
from rerank_fast.data import load_lists
from rerank_fast.demo import encoder_directory
from rerank_fast.evaluation import RerankingEvaluator
from rerank_fast.model.precision.hardware import is_fast

SEED = 12
BATCH_SIZE = 16
LEARNING_RATE = 2e-5
WARMUP_RATIO = 0.1


def _train_ours(
    encoder: str, lists: Dataset, output: str, options: argparse.Namespace
) -> tuple[Any, float, int]:
    set_seed(SEED)
    model = CrossEncoder(encoder, max_length=options.max_length)
    started = time.perf_counter()
    config = TrainingConfig(
        output=output,
        batch_size=BATCH_SIZE,
        max_steps=options.max_steps,
        max_length=options.max_length,
        learning_rate=LEARNING_RATE,
        warmup_ratio=WARMUP_RATIO,
        precision=options.precision,
        seed=SEED,
        save_steps=10**9,
    )
    result = Trainer(model, lists, config=config).train()
    return model, time.perf_counter() - started, result.steps


def _train_peer(
    encoder: str, lists: Dataset, output: str, options: argparse.Namespace
) -> tuple[Any, float, int]:
    from sentence_transformers.cross_encoder import CrossEncoder as PeerCrossEncoder
    from sentence_transformers.cross_encoder import (
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import LambdaLoss, NDCGLoss2PPScheme

    set_seed(SEED)
    model = PeerCrossEncoder(encoder, num_labels=1, max_length=options.max_length)
    started = time.perf_counter()
    arguments = CrossEncoderTrainingArguments(
        output_dir=output,
        num_train_epochs=1,
        max_steps=options.max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_RATIO,  # below 1 it is a share of the steps
        bf16=options.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),  # without it bf16 is refused on a CPU
        seed=SEED,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
    )
    loss = LambdaLoss(
        model, weighting_scheme=NDCGLoss2PPScheme(), mini_batch_size=options.mini_batch_size
    )
    trainer = CrossEncoderTrainer(model=model, args=arguments, train_dataset=lists, loss=loss)
    trainer.train()
    model.save_pretrained(output)
    return model, time.perf_counter() - started, trainer.state.global_step


PACKAGES = {"rerank_fast": _train_ours, "sentence-transformers": _train_peer}


def main() -> None:
    parser = make_parser(__name__)
    add_rows(parser)
    parser.add_argument("--train", required=True, help="lists to train on")
    parser.add_argument("--eval", required=True, help="lists to measure NDCG@10 on")
    parser.add_argument(
        "--model", default=None, help="encoder; the demo extra's all-MiniLM-L6-v2 where left out"
    )
    parser.add_argument(
        "--max_steps", type=int, default=-1, help="optimizer steps instead of one epoch"
    )
    parser.add_argument("--max_length", type=int, default=256, help="longest pair in tokens")
    parser.add_argument(
        "--mini_batch_size", type=int, default=16, help="of sentence-transformers' loss"
    )
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--only", choices=tuple(PACKAGES), default=None, help="run one of the two")
    parser.add_argument("--output", default="epoch.json", help="JSON file for the figures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.precision == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options.precision = "bf16" if is_fast(torch.bfloat16, device) else "fp32"

    encoder = options.model or encoder_directory()
    lists, evaluator = load_lists(options.train), RerankingEvaluator(options.eval)
    results: dict[str, dict[str, float]] = {}
    for name, train in PACKAGES.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as output:
            model, seconds, steps = train(encoder, lists, output, options)
        # score_tokens or predict: raw scores either way, dropout off.
        results[name] = {"seconds": seconds, "steps": steps, **evaluator(model.eval())}
        print(
            f"{name}: {steps} steps in {seconds:.1f} s, NDCG@10 {results[name]['ndcg@10']:.4f}",
            flush=True,
        )

    print(f"\n{'package':<24} {'steps':>6} {'seconds':>9} {'ndcg@10':>8} {'mrr@10':>8} {'map':>8}")
    for name, row in results.items():
        metrics = " ".join(f"{row[metric]:>8.4f}" for metric in ("ndcg@10", "mrr@10", "map"))
        print(f"{name:<24} {row['steps']:>6} {row['seconds']:>9.1f} {metrics}")
    if len(results) == 2:
        ours, peer = results["rerank_fast"], results["sentence-transformers"]
        difference = ours["ndcg@10"] - peer["ndcg@10"]
        print(f"{peer['seconds'] / ours['seconds']:.2f} times as fast, NDCG@10 {difference:+.4f}")
        case = f"{Path(options.train).stem}, {ours['steps']} steps, {options.precision}"
        remark = f"NDCG@10 {ours['ndcg@10']:.3f}, peer {peer['ndcg@10']:.3f}"
        row = Row("steps/epoch", case, peer["seconds"], ours["seconds"], "s", remark)
        Run.of_script(options.rows, "benchmarks.steps.epoch", [row])
    settings = {
        **{name: value for name, value in vars(options).items() if name != "output"},
        **{"seed": SEED, "batch_size": BATCH_SIZE},
        **{"learning_rate": LEARNING_RATE, "warmup_ratio": WARMUP_RATIO},
        **{
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    content = {"settings": settings, "results": results}
    Path(options.output).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"Figures written to {options.output}")


if __name__ == "__main__":
    main()

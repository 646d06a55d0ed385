"""The training loop: lists in, best model out. Read `Trainer._step` and `Trainer.train` first."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from rerank_fast.data.lists import Source, load_lists
from rerank_fast.data.tokenized import TokenizedLists, tokenize_lists
from rerank_fast.evaluation.reranking import RerankingEvaluator
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.scoring import run
from rerank_fast.ops.lambda_loss import lambda_loss
from rerank_fast.training.checkpoints import check_output, clear_output, save_checkpoint, write_json
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.model_card import RunCard


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to; metrics are those of the saved model, empty without evaluation lists."""

    output: str
    steps: int
    best_step: int
    metrics: dict[str, float]
    train_loss: float  # mean over all steps
    seconds: float


class Trainer:
    """Fine-tunes a CrossEncoder on ranking lists with LambdaLoss.

    Args:
        model: a CrossEncoder, trained on its device, or the path or hub id of one. Its weights become fp32.
        train_lists: whatever `load_lists` takes.
        eval_lists: the same; without them and an evaluator the last model is saved instead of the best.
        evaluator: a NanoBEIREvaluator, or any other that gives metrics for a model; metric_for_best is among
            its metrics' names. eval_lists beside it are measured too, their metrics named eval_.
        config: settings; see TrainingConfig.

    Raises:
        ValueError: malformed lists, a model that can't be opened, or an output that holds a model or can't be
            written; all before training begins.
    """

    def __init__(
        self,
        model: CrossEncoder | str | Path,
        train_lists: Source,
        *,
        eval_lists: Source | None = None,
        evaluator: Callable[[CrossEncoder], dict[str, float]] | None = None,
        config: TrainingConfig | None = None,
    ) -> None:
        self.config = config = config or TrainingConfig()
        self.output = Path(config.output)
        check_output(self.output, overwrite=config.overwrite)
        lists = load_lists(train_lists)
        self.card = RunCard(lists, [train_lists] if isinstance(train_lists, str) else [])
        self.evaluators = [] if evaluator is None else [evaluator]
        if eval_lists is not None:
            name = "" if evaluator is None else "eval"
            self.evaluators.append(RerankingEvaluator(eval_lists, at_k=config.at_k, name=name))
        names = [name for one in self.evaluators for name in getattr(one, "metric_names", [config.metric_for_best])]
        if names and config.metric_for_best not in names:
            raise ValueError(f"metric_for_best is {config.metric_for_best}, but there are {', '.join(names)}")
        # Not Accelerator: its precision is one per process, and a second run may want another.
        state = PartialState()
        if state.num_processes > 1:
            raise ValueError(f"training runs in one process, but was launched in {state.num_processes}")
        set_seed(config.seed)  # before the model: a fresh head is random
        self.model = model if isinstance(model, CrossEncoder) else CrossEncoder(model, device=state.device)
        self.model.float()  # bf16 weights would round a step of the recipe's size away
        if config.max_length is not None:
            self.model.max_length = config.max_length
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.lists: TokenizedLists = tokenize_lists(lists, self.model, show_progress_bar=config.show_progress_bar)
        self.steps_per_epoch = math.ceil(len(self.lists) / config.batch_size)
        self.num_steps = (
            config.max_steps if config.max_steps > 0 else math.ceil(config.num_epochs * self.steps_per_epoch)
        )
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=config.learning_rate, fused=True)
        self.scheduler = get_scheduler(
            config.schedule,
            self.optimizer,
            num_warmup_steps=math.ceil(config.warmup_ratio * self.num_steps),
            num_training_steps=self.num_steps,
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]

    def _batches(self) -> Iterator[TokenizedLists]:
        """Lists in a fresh order every epoch, without end."""
        generator = np.random.default_rng(self.config.seed)
        while True:
            order = generator.permutation(len(self.lists))
            for start in range(0, len(order), self.config.batch_size):
                yield self.lists.select(order[start : start + self.config.batch_size])

    def _scores(self, batch: TokenizedLists) -> Tensor:
        """(N,) fp32 scores of a batch's pairs, from forwards over pairs of similar length."""
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        step = self.model.step(batch.pairs, dtype=dtype)
        return run(step, max_pairs=self.config.mini_batch_size, max_tokens=self.config.max_tokens_per_microbatch)

    def _step(self, batch: TokenizedLists) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        config, device = self.config, self.model.device
        loss = lambda_loss(
            self._scores(batch),
            torch.from_numpy(batch.labels).to(device),
            torch.from_numpy(batch.list_offsets).to(device),
            scheme=config.scheme,
            k=config.k,
            sigma=config.sigma,
            mu=config.mu,
            eps=config.eps,
            reduction_log=config.reduction_log,
            reduction=config.reduction,
        )
        loss.backward()
        if config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self) -> TrainingResult:
        """Run to the end, keep the best model in the output directory.

        Raises:
            FloatingPointError: the loss is not finite.
            KeyboardInterrupt: after a checkpoint was written.
        """
        config, model, started = self.config, self.model, time.perf_counter()
        clear_output(self.output)
        self.card.start(model, self.output)
        # LambdaLoss trains raw scores: a sigmoid on top would only saturate.
        model.activation_fn = nn.Identity()
        model.train()
        best: dict[str, float] = {}
        best_step, step, loss_sum = 0, 0, 0.0
        losses: list[Tensor] = []  # since the last log line, on the device
        pairs, logged_at = 0, time.perf_counter()
        bar = tqdm(total=self.num_steps, desc="Training", disable=not config.show_progress_bar)
        try:
            for batch in self._batches():
                learning_rate = self.scheduler.get_last_lr()[0]  # of this step
                losses.append(self._step(batch))
                step += 1
                pairs += len(batch.pairs)
                bar.update()
                evaluates = self.evaluators and (step % config.eval_steps == 0 or step == self.num_steps)
                saves = step % config.save_steps == 0 and step < self.num_steps
                # Also before a save: a diverged model never replaces a sound one.
                if step % config.logging_steps == 0 or step == self.num_steps or evaluates or saves:
                    loss = self._finite_mean(losses, step)
                    loss_sum += loss * len(losses)
                    rate = pairs / (time.perf_counter() - logged_at)
                    bar.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.2e}", pairs_per_s=f"{rate:.0f}")
                    self._log(step, loss=loss, learning_rate=learning_rate, pairs_per_second=rate)
                    losses, pairs, logged_at = [], 0, time.perf_counter()
                if evaluates:
                    paused_at = time.perf_counter()
                    metrics = {name: value for one in self.evaluators for name, value in one(model).items()}
                    self._log(step, **metrics)
                    name = config.metric_for_best
                    if not best or metrics[name] > best[name]:
                        best, best_step = metrics, step
                        model.save_pretrained(self.output, overwrite=True)
                    logged_at += time.perf_counter() - paused_at
                if saves:
                    self._checkpoint(step, best, best_step)
                if step == self.num_steps:
                    break
        except KeyboardInterrupt:
            path = self._checkpoint(step, best, best_step)
            bar.write(f"Interrupted at step {step} of {self.num_steps}: {path} holds the model as it was.")
            raise
        finally:
            bar.close()
        model.eval()
        if not best:
            best_step = step
            model.save_pretrained(self.output, overwrite=True)
        seconds = time.perf_counter() - started
        result = TrainingResult(str(self.output), step, best_step, best, loss_sum / step, seconds)
        write_json(self.output / "metrics.json", {**asdict(result), "config": asdict(config)})
        self.card.finish(self, result)
        return result

    def _finite_mean(self, losses: list[Tensor], step: int) -> float:
        mean = float(torch.stack(losses).mean())  # the one wait for the device, once a log line
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss became {mean} in the steps up to {step}; the newest checkpoint in {self.output} is from "
                "before. A lower learning rate or precision fp32 may help."
            )
        return mean

    def _log(self, step: int, **values: float) -> None:
        row = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
        with (self.output / "train_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _checkpoint(self, step: int, best: dict[str, float], best_step: int) -> Path:
        state = {"best_step": best_step, "best_metrics": best, "config": asdict(self.config)}
        return save_checkpoint(self.model, self.output, step, state, keep=self.config.save_total_limit)

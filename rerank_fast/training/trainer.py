"""The training loop: lists in, best model out. Read `Trainer.step` and then
run.py."""

from __future__ import annotations

import copy
import logging
import math
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from rerank_fast.cards.run import RunCard
from rerank_fast.data.batches import Batch, BatchMaker, check_all_labels
from rerank_fast.data.lists import ListStream, Source, names_of, open_lists
from rerank_fast.evaluation.evaluator import Evaluator
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.precision.hardware import arithmetic
from rerank_fast.objectives.base import Objective
from rerank_fast.training import checkpoints, precision
from rerank_fast.training.backward import Backward
from rerank_fast.training.clipping import clip_gradients
from rerank_fast.training.collapse import CollapseGuard
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import collectives, launch
from rerank_fast.training.events import Callback, TrainingInterrupted
from rerank_fast.training.micro_batches import probe_max_tokens
from rerank_fast.training.objective import choose_objective, described_settings
from rerank_fast.training.run import Run, TrainingResult
from rerank_fast.training.run_log import Rates, check_trackers
from rerank_fast.training.schedule import make_schedule
from rerank_fast.training.validation import Validation
from rerank_fast.training.weights import TrainedWeights

logger = logging.getLogger(__name__)


class Trainer:
    """Fine-tunes a CrossEncoder on ranking lists, with LambdaLoss or another objective.

    Launched in several processes (accelerate launch, torchrun) they share every batch and every
    evaluation, with FSDP2 also the weights and the optimizer's state; the first one writes.

    Args:
        model: a CrossEncoder, trained on its device, or the path or hub id of one. Its weights
            become fp32, or bf16 with precision "bf16-pure". After train() it is an ordinary model,
            with load_best of the weights that were saved, else or where the run was interrupted of
            the last ones: adapters are merged, and the same parameters require gradients as before.
            Its activation function stays what it is.
        train_lists: whatever `load_lists` takes; a ListStream or a `datasets.IterableDataset` is
            streamed.
        eval: lists to measure the model on, in those forms; without them and an evaluator the last
            model is saved instead of the best. Scores are computed in the dtype that the run
            multiplies in (fp32 where a CPU only emulates that), so that metrics may differ from the
            saved model's in fp32 by its rounding.
        evaluator: a NanoBEIREvaluator, or any other that gives metrics for a model, of which any
            may be metric_for_best. The lists of eval beside it are measured too, their metrics
            named eval_.
        config: settings; see TrainingConfig.
        objective: a loss of your own, or one that is made already, in place of the one that the
            settings name.
        callbacks: functions that are told of events; see Event.

    Raises:
        ValueError: malformed lists, labels that do not fit the objective (names the list), a model
            that can't be opened, or an output that holds a model, is in use or can't be written;
            all before training begins, and nothing is written before.
    """

    def __init__(
        self,
        model: CrossEncoder | str | Path,
        train_lists: Source | ListStream,
        *,
        eval: Source | None = None,
        evaluator: Evaluator | None = None,
        config: TrainingConfig | None = None,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not isinstance(config, TrainingConfig | None):
            raise ValueError(f"config must be a TrainingConfig, got a {type(config).__qualname__}")
        if not isinstance(model, CrossEncoder | str | os.PathLike):
            raise ValueError(
                "model must be a rerank_fast.CrossEncoder, a model's directory or a hub id, "
                f"got a {type(model).__module__}.{type(model).__qualname__}"
            )
        config, told = launch.settle(config or TrainingConfig())
        self.config = config
        self.objective, self._own_objective = choose_objective(config, objective), objective
        self.output = Path(config.output)
        self.callbacks = callbacks
        check_trackers(config.trackers)
        self.processes = collectives.join_processes(config.distributed_timeout)
        if told:
            self.say(f"As accelerate launch was told: {', '.join(told)}.")
        self.resumed_from = self._check_output()
        self.same_run = checkpoints.is_of(self.resumed_from, self.output)
        self.lists = self._open_lists(train_lists)
        self.card = RunCard(
            self.lists, names_of(train_lists), [] if eval is None else names_of(eval)
        )
        self.validation = Validation(eval, evaluator, config, self.objective)
        set_seed(config.seed)  # before the model: a fresh head is random
        self.model = self._open_model(model)
        self.config = config = precision.settle(config, self.model.device, self.resumed_from)
        self.trained = TrainedWeights(self.model, config)
        self.weights = self.trained.weights
        self.num_batches, self.num_steps = self._count_steps()
        self.optimizer = self.trained.make_optimizer()
        self.scheduler = make_schedule(self.optimizer, config, self.num_steps)
        self.scaler = torch.amp.GradScaler(
            self.model.device.type, enabled=config.precision == "fp16"
        )
        dtype = precision.products_in(config, self.model.device)
        tokens = config.max_tokens_per_microbatch or probe_max_tokens(self.model, dtype)
        trained = self.trained
        scale, forget, final = self.scaler.scale, trained.forget_gradients, trained.final
        self.backward = Backward(self.model, config, self.objective, scale, forget, tokens, final)
        # An emulated dtype's scores cost as much as its training: those of fp32 are better and
        # faster.
        self.evaluated_in = arithmetic(dtype, self.model.device)
        self._scorer: Any = self.model
        if self.processes.num_processes > 1:
            self._scorer = collectives.ShardedScorer(self.model, self.processes)
        self.guard = CollapseGuard(
            config.metric_for_best, self.model.activation_fn, config.learning_rate
        )
        self.described: dict[str, Any] = {}  # the run's settings and data, from its beginning on
        self.stops = self._ran = False

    # -- what a run begins with -------------------------------------------------------------------

    def _check_output(self) -> Path | None:
        """The checkpoint to go on from, of an output that this run may write."""
        config = self.config
        resumed_from = checkpoints.check_output(
            self.output, resume=config.resume, overwrite=config.overwrite, say=self.say
        )
        if self.processes.is_main_process and self.output.is_dir():
            # Not in use now; a run holds it from its beginning.
            with checkpoints.opened(self.output):
                pass
        return resumed_from

    def _open_lists(self, source: Source | ListStream) -> Dataset | ListStream:
        lists = open_lists(source, streaming=self.config.streaming)
        if isinstance(lists, ListStream):  # whose labels are checked as they are read
            if self.config.max_steps <= 0:
                raise ValueError(
                    "max_steps must be set to train on a stream: its length is not known"
                )
            return lists
        advice = check_all_labels(self.objective, lists)
        if advice and self.processes.is_main_process:
            logger.warning("%s", advice)
        return lists

    def _open_model(self, model: CrossEncoder | str | Path) -> CrossEncoder:
        """On this process's device, as the settings have it."""
        config, processes = self.config, self.processes
        if not isinstance(model, CrossEncoder):
            model = CrossEncoder(model, device=processes.device)
        if processes.num_processes > 1:
            model.to(processes.device)
        if config.max_length is not None:
            model.max_length = config.max_length
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if config.torch_compile:
            model.compile()
        return model

    def _count_steps(self) -> tuple[int | None, int]:
        """Batches of an epoch, not known of a stream, and steps of the run."""
        config = self.config
        if isinstance(self.lists, ListStream):
            return None, config.max_steps
        batches = math.ceil(len(self.lists) / config.batch_size)
        steps = math.ceil(config.num_epochs * batches)
        return batches, config.max_steps if config.max_steps > 0 else steps

    # -- one step ---------------------------------------------------------------------------------

    def step(
        self,
        batch: Batch,
        rates: Rates | None = None,
        *,
        interrupted: bool = False,
        logged: bool = False,
    ) -> Tensor:
        """One optimizer step on a global batch.

        Args:
            batch: this process's share, from batches().
            rates: counts pairs, tokens and waiting for the log.
            interrupted: this process was told to stop; all processes learn of it.
            logged: measure how far the scores of a list lie apart.

        Returns:
            (8,) fp32 on the device: the loss of the whole batch; the norm of
            its gradient before clipping; how many processes were interrupted; 1 where fp16
            overflowed and the step was left out, else 0; and four sums of spread_of_lists, zeros
            unless the step is logged.
        """
        config, device, rates = self.config, self.model.device, rates or Rates()
        # Loss, units under a cut, interrupted processes, spread.
        totals = torch.zeros(7, device=device)
        totals[2] = float(interrupted)
        with self.trained.whole():
            parts = batch.lists.split(config.gradient_accumulation_steps)
            # Over the units of all processes' lists: the loss does not depend on how a batch is
            # cut.
            totals[0], totals[1] = self.backward(parts, batch.units, rates)
            if logged:
                totals[3:] = self.backward.spread()
            gradients = self.trained.sum_gradients(totals)
        if self.objective.cut_by_rank:
            # How many units the cut leaves is known only now that all are scored.
            assert batch.units is not None
            assert not isinstance(batch.units, tuple)
            factor = max(batch.units, 1) / totals[1].clamp(min=1)
            totals[0] *= factor
            torch._foreach_mul_(gradients, factor)
        self.scaler.unscale_(self.optimizer)
        limit = config.max_grad_norm or math.inf
        norm = self.trained.gathered(clip_gradients(self.weights.values(), limit))
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        overflowed = self.scaler.get_scale() < scale
        if not overflowed:
            self.scheduler.step()
            self.trained.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        outcome = [totals[0], norm.detach(), totals[2], torch.full_like(norm, float(overflowed))]
        return torch.cat([torch.stack(outcome), totals[3:]])

    # -- the run ----------------------------------------------------------------------------------

    def train(self) -> TrainingResult:
        """Run to the end, keep the best model in the output directory.

        Raises:
            ValueError: the checkpoint does not fit the run, or another process writes to the
                output.
            FloatingPointError: the loss or its gradient is not finite.
            TrainingInterrupted: SIGTERM or SIGINT came, and a checkpoint was written; ends the
                process with code 0.
            CheckpointError: a checkpoint could not be written; the one before is whole.
            RuntimeError: this Trainer has run before.
        """
        if self._ran:
            raise RuntimeError(
                "a Trainer runs once, and this one has: make a new one to train again or to resume"
            )
        self._ran = True
        writes = self.processes.is_main_process
        try:
            with checkpoints.opened(self.output) if writes else nullcontext():
                return Run(self)()
        except BaseException as error:
            # Of the rest nobody knows that every process is here.
            self.trained.finish(together=isinstance(error, TrainingInterrupted))
            raise

    @property
    def settings(self) -> dict[str, Any]:
        """All settings as plain values; an objective that was given stands in for those it
        replaces.
        """
        return described_settings(self.config, self._own_objective)

    def stop(self) -> None:
        """End the run after the current step, as if it were the last; for callbacks, in every
        process.
        """
        self.stops = True

    def batches(self, epoch: int = 0, number: int = 0) -> Generator[Batch, None, None]:
        """This process's shares of the batches, beginning with one of an epoch, without end."""
        # In a thread of its own, where an evaluation may tokenise beside it.
        tokenizes = copy.copy(self.model)
        tokenizes.tokenizer = copy.deepcopy(self.model.tokenizer)
        maker = BatchMaker(
            self.lists,
            tokenizes,
            self.objective,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            max_docs_per_list=self.config.max_docs_per_list,
            in_batch_negatives=self.config.in_batch_negatives,
            shuffle_buffer=self.config.shuffle_buffer,
            rank=self.processes.process_index,
            num_ranks=self.processes.num_processes,
        )
        return maker.batches(epoch, number)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the model as it is now, by name, in every process; with averaging, of the
        averaged weights.
        """
        with self.trained.averaged(), self.model.computing_in(self.evaluated_in):
            return self.validation(self._scorer)

    def say(self, line: str) -> None:
        """A line for people, once for all processes, above a progress bar."""
        if self.processes.is_main_process:
            tqdm.write(line, file=sys.stderr)

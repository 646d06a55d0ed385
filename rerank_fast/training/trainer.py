"""The training loop: lists in, best model out. Read `Trainer._step` and `Trainer._run` first."""

from __future__ import annotations

import copy
import logging
import math
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from rerank_fast.cards.record import RunRecord
from rerank_fast.cards.run import RunCard
from rerank_fast.data.batches import Batch, BatchMaker, check_all_labels
from rerank_fast.data.lists import ListStream, Source, names_of, open_lists
from rerank_fast.evaluation.evaluator import Evaluator
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.precision.hardware import arithmetic
from rerank_fast.model.tokens.ahead import ahead
from rerank_fast.objectives.base import Objective
from rerank_fast.training import checkpoints, precision
from rerank_fast.training.backward import Backward
from rerank_fast.training.collapse import CollapseGuard
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import collectives, launch
from rerank_fast.training.events import Callback, Event, Signals, TrainingInterrupted
from rerank_fast.training.micro_batches import probe_max_tokens
from rerank_fast.training.objective import choose_objective, described_settings
from rerank_fast.training.run_identity import describe_run
from rerank_fast.training.run_log import Rates, RunLog, check_trackers
from rerank_fast.training.run_state import Progress, capture, restore
from rerank_fast.training.schedule import make_schedule
from rerank_fast.training.validation import Validation
from rerank_fast.training.weights import TrainedWeights

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Metrics are those of the saved model, scored in the dtype that the run multiplied in; empty
    without evaluation lists.
    """

    output: str
    steps: int
    best_step: int
    metrics: dict[str, float]
    train_loss: float  # mean over all steps
    seconds: float  # of the whole run, also of what was before it was resumed
    evaluation_seconds: float  # those of them in which the model was measured


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
            self._say(f"As accelerate launch was told: {', '.join(told)}.")
        self.resumed_from = checkpoints.check_output(
            self.output, resume=config.resume, overwrite=config.overwrite, say=self._say
        )
        if self.processes.is_main_process and self.output.is_dir():
            with checkpoints.opened(
                self.output
            ):  # not in use now; a run holds it from its beginning
                pass
        self._same_run = checkpoints.is_of(self.resumed_from, self.output)
        self.lists = open_lists(train_lists, streaming=config.streaming)
        self.card = RunCard(
            self.lists, names_of(train_lists), [] if eval is None else names_of(eval)
        )
        if isinstance(self.lists, ListStream) and config.max_steps <= 0:
            raise ValueError("max_steps must be set to train on a stream: its length is not known")
        if not isinstance(self.lists, ListStream):  # a stream's are checked as they are read
            advice = check_all_labels(self.objective, self.lists)
            if advice and self.processes.is_main_process:
                logger.warning("%s", advice)
        self.validation = Validation(eval, evaluator, config, self.objective)
        set_seed(config.seed)  # before the model: a fresh head is random
        self.model = (
            model
            if isinstance(model, CrossEncoder)
            else CrossEncoder(model, device=self.processes.device)
        )
        if self.processes.num_processes > 1:
            self.model.to(self.processes.device)
        self.config = config = precision.settle(config, self.model.device, self.resumed_from)
        if config.max_length is not None:
            self.model.max_length = config.max_length
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if config.torch_compile:
            self.model.compile()
        self.trained = TrainedWeights(self.model, config)
        self.weights = self.trained.weights
        self.num_batches = None  # of an epoch; not known of a stream
        if not isinstance(self.lists, ListStream):
            self.num_batches = math.ceil(len(self.lists) / config.batch_size)
        self.num_steps = config.max_steps
        if config.max_steps <= 0:
            assert self.num_batches is not None
            self.num_steps = math.ceil(config.num_epochs * self.num_batches)
        self.optimizer = self.trained.make_optimizer()
        self.scheduler = make_schedule(self.optimizer, config, self.num_steps)
        self.scaler = torch.amp.GradScaler(
            self.model.device.type, enabled=config.precision == "fp16"
        )
        dtype = precision.products_in(config, self.model.device)
        tokens = config.max_tokens_per_microbatch or probe_max_tokens(self.model, dtype)
        scale, forget = self.scaler.scale, self.trained.forget_gradients
        self.backward = Backward(self.model, config, self.objective, scale, forget, tokens)
        # An emulated dtype's scores cost as much as its training: those of fp32 are better and
        # faster.
        self.evaluated_in = arithmetic(dtype, self.model.device)
        self._scorer: Any = self.model
        if self.processes.num_processes > 1:
            self._scorer = collectives.ShardedScorer(self.model, self.processes)
        self.guard = CollapseGuard(
            config.metric_for_best, self.model.activation_fn, config.learning_rate
        )
        self._stops = self._ran = False

    # -- one step ---------------------------------------------------------------------------------

    def _step(
        self,
        batch: Batch,
        rates: Rates | None = None,
        *,
        interrupted: bool = False,
        logged: bool = False,
    ) -> Tensor:
        """One optimizer step on a global batch.

        Returns:
            (8,) on the device: the loss of the whole batch, the norm of its gradient, processes
            that were interrupted, 1 where fp16 overflowed and the step was left out, and of a step
            that is logged spread_of_lists.
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
        norm = self.trained.gathered(nn.utils.clip_grad_norm_(self.weights.values(), limit))
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
                return self._run()
        except BaseException as error:
            # Of the rest nobody knows that every process is here.
            self.trained.finish(together=isinstance(error, TrainingInterrupted))
            raise

    def _run(self) -> TrainingResult:
        config, model = self.config, self.model
        # An objective is of raw scores, whatever is applied to them afterwards.
        self._say(f"Raw scores are trained; predict applies {model.activation_fn} to them.")
        model.train()
        progress = self._begin()
        done: list[
            tuple[Tensor, np.ndarray]
        ] = []  # since the last log line: what _step gave, and of which lists
        agreed = collectives.LateFlag()  # of the step before: processes that were interrupted
        rates = Rates()
        bar = tqdm(
            total=self.num_steps,
            initial=progress.step,
            desc="Training",
            disable=not (config.show_progress_bar and self.processes.is_main_process),
        )
        batches = ahead(self.batches(progress.epoch, progress.batch), _BATCHES_AHEAD)
        with closing(self.card), closing(self.log), closing(batches), bar, Signals() as signals:
            while not self._ends(progress.step):
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except ValueError as error:  # a malformed row of a stream
                    raise self._kept_before(error, progress, done) from error
                rates.waited += time.perf_counter() - asked
                learning_rate = float(max(self.scheduler.get_last_lr()))  # of this step
                logged = self._is_logged(progress.step + 1)
                outcome = self._step(batch, rates, interrupted=signals.came, logged=logged)
                done.append((outcome, batch.indices))
                progress.step += 1
                progress.epoch, progress.batch = batch.epoch, batch.number + 1
                progress.lists_without_gradient += batch.lists_without_gradient
                rates.pairs += batch.num_documents
                rates.negatives += batch.negatives_added
                rates.truncated += batch.lists.truncated
                bar.update()
                step = progress.step
                self._tell("step_end", step)
                interrupted = signals.came
                if self.processes.num_processes > 1:
                    # They must stop at the same step: they go by the sum of the step before.
                    interrupted = agreed.get()
                    agreed.put(outcome[2])
                due = bool(self.validation) and step % config.eval_steps == 0
                saves = step % config.save_steps == 0 or interrupted
                # Also before a save: a diverged model never replaces a sound one.
                if logged or self._ends(step) or due or saves:
                    row = {
                        **self._summary(done, progress),
                        "learning_rate": learning_rate,
                        **rates.row(),
                    }
                    self._write("log", progress, row)
                    if "tied_lists" in row:
                        self._heed(self.guard.logged(row, step * config.batch_size), step)
                    bar.set_postfix(
                        loss=f"{row['loss']:.4f}", pairs_per_s=f"{row['pairs_per_second']:.0f}"
                    )
                    done, rates = [], Rates()
                progress.evaluation_due = due
                if due and not interrupted:
                    paused = time.perf_counter()
                    self._evaluate(progress)
                    rates.started += time.perf_counter() - paused
                if saves and not self._ends(step):
                    path = self._checkpoint(progress)
                    if interrupted:
                        self.processes.wait_for_everyone()  # until it is written
                        self._say(
                            f"Stopped by a signal at step {step} of {self.num_steps}. {path} "
                            "holds everything: the same run with --resume auto, "
                            "TrainingConfig(resume='auto'), goes on from there.",
                        )
                        raise TrainingInterrupted(path)
            if self.validation and progress.evaluated < progress.step:
                self._evaluate(progress)
        model.eval()
        if not progress.best:
            progress.best_step = progress.step
            self._save_best(progress.step)
        self.trained.finish()
        self.holds_the_saved_model = (
            progress.best_step == progress.step and not self.trained.average
        )
        if config.load_best and not self.holds_the_saved_model:
            self.trained.load(self.output)
            self.holds_the_saved_model = True
        seconds, mean_loss = (
            time.perf_counter() - self._started,
            progress.loss_sum / max(progress.step, 1),
        )
        result = TrainingResult(
            output=str(self.output),
            steps=progress.step,
            best_step=progress.best_step,
            metrics=progress.best,
            train_loss=mean_loss,
            seconds=seconds,
            evaluation_seconds=progress.evaluation_seconds,
        )
        self._tell("train_end", progress.step, result.metrics)
        if self.processes.is_main_process:
            file, content = (
                self.output / checkpoints.METRICS_FILE,
                {**asdict(result), "config": self.settings},
            )
            checkpoints.write_json(file, content)
            self.card.finish(self._record(result))
            checkpoints.mark_finished(self.output)
        self.processes.wait_for_everyone()
        return result

    def _record(self, result: TrainingResult) -> RunRecord:
        return RunRecord(
            model=self.model,
            output=self.output,
            objective=self.objective,
            settings=self.settings,
            defaults=asdict(TrainingConfig()),
            max_tokens_per_microbatch=self.backward.max_tokens,
            evaluators=self.validation.evaluators,
            metric_for_best=self.config.metric_for_best,
            evaluated_in=self.evaluated_in,
            metrics=result.metrics,
            best_step=result.best_step,
            steps=result.steps,
            num_steps=self.num_steps,
            seconds=result.seconds,
            evaluation_seconds=result.evaluation_seconds,
            num_processes=self.processes.num_processes,
            holds_the_saved_model=self.holds_the_saved_model,
        )

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
        self._stops = True

    def _is_logged(self, step: int) -> bool:
        return step % self.config.logging_steps == 0 or step == self.num_steps

    def _heed(self, warning: str | None, step: int) -> None:
        """Say that the model has collapsed, and end the run where that is asked for.

        All processes find the same.
        """
        if warning is None:
            return
        stops = self.config.stop_on_collapse and not self._ends(step)
        if self.processes.is_main_process:
            logger.warning("%s%s", warning, f" Stopped at step {step}." if stops else "")
        if stops:
            self.stop()

    def _ends(self, step: int) -> bool:
        return step >= self.num_steps or self._stops

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

    def _begin(self) -> Progress:
        """A fresh start, or where the checkpoint left off."""
        config, writes = self.config, self.processes.is_main_process
        progress, position = Progress(), 0
        # Another run may have come and gone since this one was made.
        checkpoints.check_replaceable(
            self.output, self.resumed_from, resume=config.resume, overwrite=config.overwrite
        )
        self.described = describe_run(self)
        self._started = time.perf_counter()
        # Dropout differs from process to process.
        set_seed((self.config.seed + self.processes.process_index) % 2**32)
        if self.resumed_from is not None:
            values, tensors = checkpoints.load_checkpoint(self.resumed_from)
            progress = restore(self, self.resumed_from, values, tensors)
            self._started -= progress.seconds
            if self._same_run and writes:
                position = values["log_position"]
        elif self.config.resume == "auto" and checkpoints.is_unfinished(self.output):
            self._say(
                f"The unfinished run in {self.output} has no checkpoint to go on from: it begins "
                "anew."
            )
        self.processes.wait_for_everyone()  # all have read before anything is removed
        self._stops = False
        if writes:
            checkpoints.mark_unfinished(self.output, best_step=progress.best_step)
            checkpoints.clear_output(self.output, beyond=progress.step if self._same_run else 0)
            self.card.start(
                self.model,
                self.output,
                step=progress.step,
                energy=progress.energy,
                changes=progress.changes,
            )
        trackers = self.config.trackers if writes else []
        self.log = RunLog(
            self.output, trackers, self.settings, position=position, step=progress.step
        )
        self._tell("train_begin", progress.step)
        first = not progress.step and self.config.eval_on_start and bool(self.validation)
        if progress.evaluation_due or first:
            self._evaluate(progress)
        return progress

    def _summary(
        self, done: list[tuple[Tensor, np.ndarray]], progress: Progress
    ) -> dict[str, float]:
        """Means over the steps since the last log line; the one wait for the device."""
        rows = torch.stack([outcome for outcome, _ in done]).cpu().double().numpy()
        losses, norms, _, overflows, *(spread, tied, several, means) = rows.T
        bad = np.flatnonzero(~np.isfinite(losses) | ~(np.isfinite(norms) | (overflows > 0)))
        if len(bad):
            at = int(bad[0])
            step, lists = progress.step - len(done) + at + 1, done[at][1].tolist()
            if self.processes.is_main_process:
                checkpoints.note_non_finite(self.output, step, losses[at], norms[at], lists)
            what = (
                f"gradient's norm became {norms[at]}"
                if np.isfinite(losses[at])
                else f"loss became {losses[at]}"
            )
            earlier = checkpoints.checkpoints(self.output)
            before = (
                f"{earlier[-1].name} is from before"
                if earlier
                else "There is no checkpoint from before"
            )
            raise FloatingPointError(
                f"the {what} in step {step}; {self.output / checkpoints.NON_FINITE_FILE} has the "
                f"indices of its lists. {before}. A lower learning rate or precision fp32 may "
                "help."
            )
        progress.loss_sum += float(losses.sum())
        progress.overflows += int(overflows.sum())
        row = {"loss": float(losses.mean()), "gradient_norm": float(norms[-1])}
        row["lists_without_gradient"] = progress.lists_without_gradient
        if several[-1]:
            measured = {"score_spread": spread, "tied_lists": tied, "score_mean": means}
            row.update({name: float(values[-1] / several[-1]) for name, values in measured.items()})
        if self.scaler.is_enabled():
            row.update(loss_scale=self.scaler.get_scale(), overflows=progress.overflows)
        return row

    def _write(
        self, event: Literal["log", "evaluate"], progress: Progress, values: dict[str, float]
    ) -> None:
        epoch: float = progress.epoch  # of a stream its number is all there is
        if self.num_batches is not None:
            epoch = round(progress.step / self.num_batches, 4)
        if self.processes.is_main_process:
            self.log.write(progress.step, epoch, values)
        self._tell(event, progress.step, values)

    def _say(self, line: str) -> None:
        if self.processes.is_main_process:
            tqdm.write(line, file=sys.stderr)

    def _tell(self, name: Any, step: int, values: Mapping[str, Any] | None = None) -> None:
        for callback in self.callbacks:
            callback(Event(name, step, self, values or {}))

    def _evaluate(self, progress: Progress) -> None:
        """Measure the model, and save it if it is the best so far; untrained it is only
        measured.
        """
        started = time.perf_counter()
        with self.trained.averaged(), self.model.computing_in(self.evaluated_in):
            metrics = self.validation(self._scorer)
        progress.evaluation_seconds += time.perf_counter() - started
        self._write("evaluate", progress, metrics)
        greater = self.validation.greater_is_better
        self._heed(
            self.guard.evaluated(metrics, progress.step, greater_is_better=greater), progress.step
        )
        if not progress.step:
            return
        progress.evaluations_since_best += 1
        progress.evaluated, progress.evaluation_due = progress.step, False
        if self.validation.is_better(metrics, progress.best):
            progress.best, progress.best_step, progress.evaluations_since_best = (
                metrics,
                progress.step,
                0,
            )
            self._save_best(progress.step)
        patience = self.config.early_stopping_patience
        if (
            patience is not None
            and progress.evaluations_since_best >= patience
            and not self._ends(progress.step)
        ):
            logger.warning(
                "No better evaluation in %d: stopped at step %d", patience, progress.step
            )
            self.stop()

    def _save_best(self, step: int) -> None:
        if self.processes.is_main_process:
            checkpoints.save_best(self.output, self.trained.save, step)
        else:
            self.trained.help_save()

    def _kept_before(
        self, error: ValueError, progress: Progress, done: list[tuple[Tensor, np.ndarray]]
    ) -> ValueError:
        """Lists that can't be read end a run, but not without a checkpoint of the steps before.

        Of several processes the others may never come to the save.
        """
        if self.processes.num_processes > 1 or not progress.step:
            return error
        if done:
            self._summary(done, progress)
        path = self._checkpoint(progress)
        return ValueError(
            f"{error}; {path} holds the steps before: mend it and go on with --resume auto"
        )

    def _checkpoint(self, progress: Progress) -> Path:
        progress.seconds = time.perf_counter() - self._started
        progress.energy = self.card.meter.so_far()
        values, tensors = capture(self, progress, log_position=self.log.position)
        path = self.output / f"checkpoint-{progress.step}"
        if self.processes.is_main_process:
            checkpoints.save_checkpoint(
                path, self.trained.save, values, tensors, keep=self.config.save_total_limit
            )
        else:
            self.trained.help_save()
        self._tell("save", progress.step, {"path": path})
        return path

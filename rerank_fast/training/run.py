"""One run of a Trainer: its steps from a beginning or a checkpoint to the saved model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from rerank_fast.cards.record import RunRecord
from rerank_fast.data.batches import Batch
from rerank_fast.model.tokens.ahead import ahead
from rerank_fast.training import checkpoints
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import collectives
from rerank_fast.training.events import Event, Signals, TrainingInterrupted
from rerank_fast.training.run_identity import describe_run
from rerank_fast.training.run_log import Rates, RunLog
from rerank_fast.training.run_state import Progress, capture, restore

if TYPE_CHECKING:
    from rerank_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        output: directory of the saved model.
        steps: optimizer steps, those before the run was resumed included.
        best_step: the step whose model is saved; 0 is the model as it came.
        metrics: of the saved model, by name, scored in the dtype that the run multiplied in; empty
            without evaluation lists and evaluator.
        train_loss: mean over all steps.
        seconds: of the whole run, also of what was before it was resumed.
        evaluation_seconds: those of them in which the model was measured.
    """

    output: str
    steps: int
    best_step: int
    metrics: dict[str, float]
    train_loss: float
    seconds: float
    evaluation_seconds: float


class Run:
    """What lasts from the first step of a Trainer's run to its last.

    Args:
        trainer: whose model, lists and settings it is of.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.progress, self.rates = Progress(), Rates()
        # Since the last log line: what Trainer.step gave, and the indices of the lists it was of.
        self.done: list[tuple[Tensor, np.ndarray]] = []
        self.started = time.perf_counter()
        self.writes = trainer.processes.is_main_process

    def __call__(self) -> TrainingResult:
        """From the beginning to the end; raises what Trainer.train does."""
        trainer, model = self.trainer, self.trainer.model
        # An objective is of raw scores, whatever is applied to them afterwards.
        trainer.say(f"Raw scores are trained; predict applies {model.activation_fn} to them.")
        model.train()
        self._begin()
        progress = self.progress
        bar = tqdm(
            total=trainer.num_steps,
            initial=progress.step,
            desc="Training",
            disable=not (self.config.show_progress_bar and self.writes),
        )
        batches = ahead(trainer.batches(progress.epoch, progress.batch), _BATCHES_AHEAD)
        with closing(trainer.card), closing(self.log), closing(batches), bar, Signals() as signals:
            agreed = collectives.LateFlag()  # of the step before: processes that were interrupted
            while not self._ends():
                batch = self._next(batches)
                learning_rate = float(max(trainer.scheduler.get_last_lr()))  # of this step
                logged = self._is_logged(progress.step + 1)
                outcome = trainer.step(batch, self.rates, interrupted=signals.came, logged=logged)
                self._count(batch, outcome)
                bar.update()
                self._tell("step_end")
                interrupted = signals.came
                if trainer.processes.num_processes > 1:
                    # They must stop at the same step: they go by the sum of the step before.
                    interrupted = agreed.get()
                    agreed.put(outcome[2])
                due = bool(trainer.validation) and progress.step % self.config.eval_steps == 0
                saves = progress.step % self.config.save_steps == 0 or interrupted
                # Also before a save: a diverged model never replaces a sound one.
                if logged or self._ends() or due or saves:
                    row = self._log(learning_rate)
                    speed = f"{row['pairs_per_second']:.0f}"
                    bar.set_postfix(loss=f"{row['loss']:.4f}", pairs_per_s=speed)
                progress.evaluation_due = due
                if due and not interrupted:
                    paused = time.perf_counter()
                    self._evaluate()
                    self.rates.started += time.perf_counter() - paused
                if saves and not self._ends():
                    path = self._checkpoint()
                    if interrupted:
                        self._interrupt(path)
            if trainer.validation and progress.evaluated < progress.step:
                self._evaluate()
        model.eval()
        return self._finish()

    def _begin(self) -> None:
        """A fresh start, or where the checkpoint left off."""
        trainer, config, position = self.trainer, self.config, 0
        # Another run may have come and gone since this one was made.
        checkpoints.check_replaceable(
            trainer.output, trainer.resumed_from, resume=config.resume, overwrite=config.overwrite
        )
        trainer.described = describe_run(trainer)
        self.started = time.perf_counter()
        # Dropout differs from process to process.
        set_seed((config.seed + trainer.processes.process_index) % 2**32)
        if trainer.resumed_from is not None:
            values, tensors = checkpoints.load_checkpoint(trainer.resumed_from)
            self.progress = restore(trainer, trainer.resumed_from, values, tensors)
            self.started -= self.progress.seconds
            if trainer.same_run and self.writes:
                position = values["log_position"]
        elif config.resume == "auto" and checkpoints.is_unfinished(trainer.output):
            trainer.say(
                f"The unfinished run in {trainer.output} has no checkpoint to go on from: it "
                "begins anew."
            )
        progress = self.progress
        trainer.processes.wait_for_everyone()  # all have read before anything is removed
        if self.writes:
            beyond = progress.step if trainer.same_run else 0
            checkpoints.mark_unfinished(trainer.output, best_step=progress.best_step)
            checkpoints.clear_output(trainer.output, beyond=beyond)
            trainer.card.start(
                trainer.model,
                trainer.output,
                step=progress.step,
                energy=progress.energy,
                changes=progress.changes,
            )
        trackers = config.trackers if self.writes else []
        self.log = RunLog(
            trainer.output, trackers, trainer.settings, position=position, step=progress.step
        )
        self._tell("train_begin")
        first = not progress.step and config.eval_on_start and bool(trainer.validation)
        if progress.evaluation_due or first:
            self._evaluate()

    def _next(self, batches: Iterator[Batch]) -> Batch:
        asked = time.perf_counter()
        try:
            batch = next(batches)
        except ValueError as error:  # a malformed row of a stream
            raise self._kept_before(error) from error
        self.rates.waited += time.perf_counter() - asked
        return batch

    def _count(self, batch: Batch, outcome: Tensor) -> None:
        """Note a step that is done."""
        progress, rates = self.progress, self.rates
        self.done.append((outcome, batch.indices))
        progress.step += 1
        progress.epoch, progress.batch = batch.epoch, batch.number + 1
        progress.lists_without_gradient += batch.lists_without_gradient
        rates.pairs += batch.num_documents
        rates.negatives += batch.negatives_added
        rates.truncated += batch.lists.truncated

    def _is_logged(self, step: int) -> bool:
        return step % self.config.logging_steps == 0 or step == self.trainer.num_steps

    def _ends(self) -> bool:
        return self.progress.step >= self.trainer.num_steps or self.trainer.stops

    # -- what is said -----------------------------------------------------------------------------

    def _log(self, learning_rate: float) -> dict[str, float]:
        """One line for the steps since the last one."""
        row = {**self._summary(), "learning_rate": learning_rate, **self.rates.row()}
        self._write("log", row)
        if "tied_lists" in row:
            lists = self.progress.step * self.config.batch_size
            self._heed(self.trainer.guard.logged(row, lists))
        self.done, self.rates = [], Rates()
        return row

    def _summary(self) -> dict[str, float]:
        """Means over the steps since the last log line; the one wait for the device."""
        progress = self.progress
        rows = torch.stack([outcome for outcome, _ in self.done]).cpu().double().numpy()
        losses, norms, _, overflows, *(spread, tied, several, means) = rows.T
        bad = np.flatnonzero(~np.isfinite(losses) | ~(np.isfinite(norms) | (overflows > 0)))
        if len(bad):
            at = int(bad[0])
            raise self._not_finite(at, float(losses[at]), float(norms[at]))
        progress.loss_sum += float(losses.sum())
        progress.overflows += int(overflows.sum())
        row = {"loss": float(losses.mean()), "gradient_norm": float(norms[-1])}
        row["lists_without_gradient"] = progress.lists_without_gradient
        if several[-1]:
            measured = {"score_spread": spread, "tied_lists": tied, "score_mean": means}
            row.update({name: float(values[-1] / several[-1]) for name, values in measured.items()})
        scaler = self.trainer.scaler
        if scaler.is_enabled():
            row.update(loss_scale=scaler.get_scale(), overflows=progress.overflows)
        return row

    def _not_finite(self, at: int, loss: float, norm: float) -> FloatingPointError:
        """The error for one of the steps since the last log line, noted in the output."""
        output = self.trainer.output
        step, lists = self.progress.step - len(self.done) + at + 1, self.done[at][1].tolist()
        if self.writes:
            checkpoints.note_non_finite(output, step, loss, norm, lists)
        what = f"gradient's norm became {norm}" if np.isfinite(loss) else f"loss became {loss}"
        earlier = checkpoints.checkpoints(output)
        before = "There is no checkpoint from before"
        if earlier:
            before = f"{earlier[-1].name} is from before"
        return FloatingPointError(
            f"the {what} in step {step}; {output / checkpoints.NON_FINITE_FILE} has the indices "
            f"of its lists. {before}. A lower learning rate or precision fp32 may help."
        )

    def _write(self, event: Literal["log", "evaluate"], values: dict[str, float]) -> None:
        epoch: float = self.progress.epoch  # of a stream its number is all there is
        if self.trainer.num_batches is not None:
            epoch = round(self.progress.step / self.trainer.num_batches, 4)
        if self.writes:
            self.log.write(self.progress.step, epoch, values)
        self._tell(event, values)

    def _tell(self, name: Any, values: Mapping[str, Any] | None = None) -> None:
        for callback in self.trainer.callbacks:
            callback(Event(name, self.progress.step, self.trainer, values or {}))

    def _heed(self, warning: str | None) -> None:
        """Say that the model has collapsed, and end the run where that is asked for.

        Every process comes to one decision.
        """
        if warning is None:
            return
        stops = self.config.stop_on_collapse and not self._ends()
        if self.writes:
            stopped = f" Stopped at step {self.progress.step}." if stops else ""
            logger.warning("%s%s", warning, stopped)
        if stops:
            self.trainer.stop()

    # -- what is measured and kept ----------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measure the model and save it if it is the best so far; untrained it is only measured."""
        trainer, progress = self.trainer, self.progress
        started = time.perf_counter()
        metrics = trainer.evaluate()
        progress.evaluation_seconds += time.perf_counter() - started
        self._write("evaluate", metrics)
        greater = trainer.validation.greater_is_better
        self._heed(trainer.guard.evaluated(metrics, progress.step, greater_is_better=greater))
        if not progress.step:
            return
        progress.evaluations_since_best += 1
        progress.evaluated, progress.evaluation_due = progress.step, False
        if trainer.validation.is_better(metrics, progress.best):
            progress.best, progress.best_step = metrics, progress.step
            progress.evaluations_since_best = 0
            self._save_best()
        waited, patience = progress.evaluations_since_best, self.config.early_stopping_patience
        if patience is not None and waited >= patience and not self._ends():
            said = "No better evaluation in %d: stopped at step %d"
            logger.warning(said, patience, progress.step)
            trainer.stop()

    def _save_best(self) -> None:
        trained = self.trainer.trained
        if self.writes:
            checkpoints.save_best(self.trainer.output, trained.save, self.progress.step)
        else:
            trained.help_save()

    def _checkpoint(self) -> Path:
        trainer, progress = self.trainer, self.progress
        progress.seconds = time.perf_counter() - self.started
        progress.energy = trainer.card.meter.so_far()
        values, tensors = capture(trainer, progress, log_position=self.log.position)
        path = trainer.output / f"checkpoint-{progress.step}"
        if self.writes:
            keep = self.config.save_total_limit
            checkpoints.save_checkpoint(path, trainer.trained.save, values, tensors, keep=keep)
        else:
            trainer.trained.help_save()
        self._tell("save", {"path": path})
        return path

    def _interrupt(self, path: Path) -> NoReturn:
        self.trainer.processes.wait_for_everyone()  # until it is written
        self.trainer.say(
            f"Stopped by a signal at step {self.progress.step} of {self.trainer.num_steps}. {path} "
            "holds everything: the same run with --resume auto, TrainingConfig(resume='auto'), "
            "goes on from there.",
        )
        raise TrainingInterrupted(path)

    def _kept_before(self, error: ValueError) -> ValueError:
        """Lists that can't be read end a run, but not without a checkpoint of the steps before.

        Of several processes the others may never come to the save.
        """
        if self.trainer.processes.num_processes > 1 or not self.progress.step:
            return error
        if self.done:
            self._summary()
        path = self._checkpoint()
        return ValueError(
            f"{error}; {path} holds the steps before: mend it and go on with --resume auto"
        )

    def _finish(self) -> TrainingResult:
        """The model as it was saved, what the run came to, and its card."""
        trainer, progress = self.trainer, self.progress
        if not progress.best:
            progress.best_step = progress.step
            self._save_best()
        trainer.trained.finish()
        is_saved = progress.best_step == progress.step and not trainer.trained.average
        if self.config.load_best and not is_saved:
            trainer.trained.load(trainer.output)
            is_saved = True
        result = TrainingResult(
            output=str(trainer.output),
            steps=progress.step,
            best_step=progress.best_step,
            metrics=progress.best,
            train_loss=progress.loss_sum / max(progress.step, 1),
            seconds=time.perf_counter() - self.started,
            evaluation_seconds=progress.evaluation_seconds,
        )
        self._tell("train_end", result.metrics)
        if self.writes:
            content = {**asdict(result), "config": trainer.settings}
            checkpoints.write_json(trainer.output / checkpoints.METRICS_FILE, content)
            trainer.card.finish(self._record(result, holds_the_saved_model=is_saved))
            checkpoints.mark_finished(trainer.output)
        trainer.processes.wait_for_everyone()
        return result

    def _record(self, result: TrainingResult, *, holds_the_saved_model: bool) -> RunRecord:
        trainer = self.trainer
        return RunRecord(
            model=trainer.model,
            output=trainer.output,
            objective=trainer.objective,
            settings=trainer.settings,
            defaults=asdict(TrainingConfig()),
            max_tokens_per_microbatch=trainer.backward.max_tokens,
            evaluators=trainer.validation.evaluators,
            metric_for_best=self.config.metric_for_best,
            evaluated_in=trainer.evaluated_in,
            metrics=result.metrics,
            best_step=result.best_step,
            steps=result.steps,
            num_steps=trainer.num_steps,
            seconds=result.seconds,
            evaluation_seconds=result.evaluation_seconds,
            num_processes=trainer.processes.num_processes,
            holds_the_saved_model=holds_the_saved_model,
        )

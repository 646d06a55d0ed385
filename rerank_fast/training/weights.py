"""What the optimizer moves: which weights, how fast each, in which precision; and their running
average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rerank_fast.model import storage
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.digest import sample_digest
from rerank_fast.model.storage.adapters import adapters_in
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import collectives
from rerank_fast.training.distributed.buckets import GradientBuckets
from rerank_fast.training.freezing import freeze, layer_depths
from rerank_fast.training.lora import WithState, add_lora, remove_lora, save_lora
from rerank_fast.training.optimizer import make_optimizer, state_like

if TYPE_CHECKING:
    from rerank_fast.training.distributed.sharding import ShardedWeights


class TrainedWeights:
    """The weights that a run trains, by name, as the optimizer moves them.

    Args:
        model: gets adapters, frozen parameters and a dtype as the settings say; only the dtype is
            left by finish.
        config: the run's.

    Raises:
        ValueError: the model has adapters; see also freeze and add_lora.
    """

    def __init__(self, model: CrossEncoder, config: TrainingConfig) -> None:
        self._model, self._config, inner = model, config, model.model
        if adapters_in(inner):
            raise ValueError(
                "the model has PEFT adapters already: expected them merged into its weights, or "
                "lora_rank, whose adapters are merged at the end of train()"
            )
        narrow = config.precision == "bf16-pure"
        shards = config.sharding == "fsdp2" and collectives.several()
        # bf16 weights would round a step of the recipe's size away: bf16-pure has fp32 copies to
        # move, or shards.
        model.to(torch.bfloat16 if narrow and not shards else torch.float32)
        # As it was found.
        self._trainable = {name: one.requires_grad for name, one in inner.named_parameters()}
        self.lora = add_lora(model, config) if config.lora_rank else None
        if config.freeze_layers or config.freeze:
            freeze(inner, num_layers=config.freeze_layers, patterns=config.freeze)
        collectives.copy_from_first([*inner.parameters(), *inner.buffers()])
        frozen = {name: one for name, one in inner.named_parameters() if not one.requires_grad}
        # Shards of bf16-pure are cut from fp32 weights.
        self.frozen = sample_digest(frozen, torch.bfloat16 if narrow else torch.float32)
        self.shards: ShardedWeights | None = None
        if shards:
            from rerank_fast.training.distributed.sharding import (
                ShardedWeights,  # a second of imports
            )

            self.shards = ShardedWeights(inner, dtype=torch.bfloat16 if narrow else None)
        self.parameters = {name: one for name, one in inner.named_parameters() if one.requires_grad}
        self.masters = MasterWeights(self.parameters) if narrow and not shards else None
        self.weights: dict[str, Tensor] = (
            self.masters.weights if self.masters else dict(self.parameters)
        )
        self.buckets: GradientBuckets | None = None
        if collectives.several() and not shards:
            sources = zip(self.weights.values(), self.parameters.values(), strict=True)
            self.buckets = GradientBuckets(list(sources))
        self.average = WeightAverage(self.weights, config.ema_decay) if config.ema_decay else None

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The one that the settings name, over the weights.

        Raises:
            ValueError: see training.optimizer.make_optimizer; or one that can't be cut into shards.
        """
        if self.shards and self._config.optimizer == "adafactor":
            raise ValueError(
                "optimizer adafactor has no shards: expected another one, or sharding none"
            )
        return make_optimizer(self.weights, layer_depths(self._model.model), self._config)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Where the model can run: with its weights whole. Every process must enter."""
        return self.shards.whole() if self.shards else contextlib.nullcontext()

    def gathered(self, tensor: Tensor) -> Tensor:
        """All of a weight, or of what the optimizer keeps for one. Every process must call it."""
        return self.shards.gathered(tensor) if self.shards else tensor

    def part_of(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """What this process keeps of a tensor that is the weight's, or the optimizer's for it."""
        return self.shards.part_of(tensor, weight) if self.shards else tensor

    def finish(self, *, together: bool = True) -> None:
        """Leave an ordinary model of the last weights: whole, adapters merged, requires_grad as it
        was found.

        Every process must call it, unless together is False: shards then stay shards. A second call
        does nothing.
        """
        self._model.eval()
        if self.shards and together:
            self.shards.dissolve()
        if self.masters:
            self.masters.release()
        if self.buckets is not None:
            self.buckets.release()
        for weight in self.parameters.values():
            weight.grad = None  # of a step that did not come to its end
        if self.lora is not None and (together or not self.shards):
            remove_lora(self.lora)
            self.lora = None
        for name, parameter in self._model.model.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(self._trainable[name])

    def sum_gradients(self, totals: Tensor) -> list[Tensor]:
        """Sum gradients and totals over all processes, inside `whole`; returns this one's part of
        the gradients.
        """
        if self.shards is not None:
            collectives.sum_over_processes([totals])
            return self.shards.sum_gradients()
        if self.buckets is not None:
            return self.buckets.finish(totals)
        for weight in self.weights.values():
            if weight.grad is None:  # decay acts on every weight
                weight.grad = torch.zeros_like(weight)
        return [weight.grad for weight in self.weights.values() if weight.grad is not None]

    def final(self, shared: Sequence[Tensor]) -> None:
        """The next backward is this process's last one of the step, but for what follows through
        the graphs of shared tensors: gradients may be summed.
        """
        if self.buckets is not None:
            self.buckets.final(shared)

    def forget_gradients(self) -> None:
        """As if nothing had gone back yet; before the processes sum."""
        for weight in (*self._model.parameters(), *self.weights.values()):
            weight.grad = None
        if self.shards:
            self.shards.forget_gradients()
        if self.buckets is not None:
            self.buckets.begin_anew()

    def after_step(self) -> None:
        """What follows a step of the optimizer."""
        if self.shards:
            self.shards.reshard()
        if self.masters:
            self.masters.write_back()
        if self.average:
            self.average.update(self.weights)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model as it is used: whole, with its running average where one is kept. Every process
        must enter.
        """
        average = (
            self.average.applied(self.parameters) if self.average else contextlib.nullcontext()
        )
        with average, self.whole():
            yield

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Weights, what the optimizer keeps for each, and their average, whole; in the process that
        writes.

        As weights.NAME, optimizer.NAME.KEY and average.NAME. Every process must call it; the others
        get nothing.
        """
        parts = {f"weights.{name}": weight.detach() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    parts[f"optimizer.{name}.{key}"] = value
        if self.average is not None:
            parts |= {f"average.{name}": value for name, value in self.average.weights.items()}
        tensors = {}
        for name, part in parts.items():
            whole = self.gathered(part)
            if collectives.is_first():
                # Shards gathered on a GPU would not fit there together.
                tensors[name] = whole if whole is part else whole.cpu()
        return tensors

    @torch.no_grad()
    def load_state_dict(
        self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Put back what state_dict gave, which check_tensors has found to fit."""
        device = self._model.device
        kept: dict[str, dict[str, Tensor]] = {}  # by the optimizer, for each weight
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                weight_name, _, key = rest.rpartition(".")
                kept.setdefault(weight_name, {})[key] = value
        on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
        for name, weight in self.weights.items():
            weight.copy_(self.part_of(tensors[f"weights.{name}"].to(device), weight))
            for key, value in kept.get(name, {}).items():
                # What is one number, as the count of steps, stays on the CPU but where a kernel
                # reads it.
                place = device if value.dim() or on_device else value.device
                optimizer.state[weight][key] = self.part_of(value.to(place, copy=True), weight)
        if self.masters is not None:
            self.masters.write_back()
        if self.average is not None:
            for name, value in self.average.weights.items():
                # One that begins here.
                saved = tensors.get(f"average.{name}", tensors[f"weights.{name}"])
                value.copy_(self.part_of(saved.to(device), value))

    def save(self, directory: Path) -> None:
        """Write the model as it is used: adapters merged, and written beside it too.

        By one process; the others call help_save.
        """
        inner: Any = self._model.model
        with self.averaged():
            state = self.shards.state() if self.shards else inner.state_dict()
            if self.lora is not None:
                save_lora(self._model, self.lora, directory, state, overwrite=True)
            else:
                written = WithState(inner, state)
                self._model.save_as(
                    directory, directory.resolve().name, overwrite=True, model=written
                )

    def load(self, directory: Path) -> None:
        """The weights that save wrote, into the ordinary model that finish leaves.

        The first process reads them. Every process must call it.
        """
        inner: Any = self._model.model
        if collectives.is_first():
            inner.load_state_dict(storage.load(str(directory), dtype=None).model.state_dict())
        collectives.copy_from_first([*inner.parameters(), *inner.buffers()])

    def help_save(self) -> None:
        """What the process that saves needs of the others: their parts of the weights."""
        if self.shards:
            with self.averaged():
                pass


def check_tensors(
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    stepped: bool,
    averaged: bool,
    where: str,
) -> None:
    """That tensors of a checkpoint are those of the weights, of their dtypes and shapes.

    Args:
        tensors: weights.NAME, optimizer.NAME.KEY with what the optimizer keeps, average.NAME.
        weights: to be trained, by name.
        optimizer: of the weights.
        stepped: the optimizer has made a step.
        averaged: a running average was kept.
        where: the file, for errors.

    Raises:
        ValueError: one is missing, unknown, or of another dtype or shape; names it.
    """
    expected = {}
    moments = {}
    for name, weight in weights.items():
        for kind in (f"weights.{name}", f"average.{name}"):
            expected[kind] = (weight.dtype, tuple(weight.shape))
        kept = {
            f"optimizer.{name}.{key}": value for key, value in state_like(optimizer, weight).items()
        }
        expected |= {key: (value.dtype, tuple(value.shape)) for key, value in kept.items()}
        moments[name] = list(kept)
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{where}, tensor {name}: unknown; this run trains no such weight")
        if (found := (tensor.dtype, tuple(tensor.shape))) != expected[name]:
            dtype, shape = expected[name]
            raise ValueError(
                f"{where}, tensor {name}: expected {dtype} of shape {shape}, got {found[0]} of "
                f"{found[1]}"
            )
    needed = [f"weights.{name}" for name in weights]
    if averaged:
        needed += [f"average.{name}" for name in weights]
    started = [name for name in weights if any(one in tensors for one in moments[name])]
    if stepped and not started:  # a weight that never had a gradient has none, but not all of them
        started = list(weights)
    for name in started:
        needed += moments[name]
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"{where}: {len(missing)} tensors are missing, as {missing[0]}")


class MasterWeights:
    """fp32 copies of bf16 weights: gradients arrive in them, the optimizer moves them, write_back
    rounds.

    A step of a usual learning rate is smaller than the distance of two bf16 numbers: on the weights
    themselves most of it would be lost.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = list(parameters.values())
        self.weights = {name: parameter.detach().float() for name, parameter in parameters.items()}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_mover(master))
            for parameter, master in zip(self._parameters, self.weights.values(), strict=True)
        ]

    @torch.no_grad()
    def write_back(self) -> None:
        torch._foreach_copy_(self._parameters, list(self.weights.values()))

    def release(self) -> None:
        """From now on gradients stay in the bf16 weights."""
        for hook in self._hooks:
            hook.remove()


def _mover(master: Tensor) -> Any:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    return move


class WeightAverage:
    """Exponential moving average of weights: average += (1 - decay) * (weight - average) after
    every step.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        torch._foreach_lerp_(list(self.weights.values()), list(weights.values()), 1 - self.decay)

    @contextlib.contextmanager
    def applied(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """With the averages in place of the parameters, to evaluate and to save."""
        chosen = [parameters[name] for name in self.weights]
        kept = [parameter.detach().clone() for parameter in chosen]
        _copy(chosen, list(self.weights.values()))
        try:
            yield
        finally:
            _copy(chosen, kept)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):  # shards have no torch._foreach_copy_
        target.copy_(source)

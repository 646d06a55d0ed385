"""Weights, gradients and optimizer state in parts over the processes: PyTorch's FSDP2, one step at
a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from rerank_fast.training.distributed.collectives import messages


class ShardedWeights:
    """A model whose parameters are shards (DTensors) between steps, and whole inside `whole()`.

    Each of N processes keeps a part of the fp32 weights, of their gradient and of the optimizer's
    moments: 16 / N bytes a parameter. From the beginning of a step to the sum of its gradients it
    also holds the whole weights in dtype, and the whole gradient in fp32.

    FSDP2's own hooks gather and reduce in every forward and backward of a module. Packed execution
    does not call the modules, and the processes run different numbers of micro-batches, whose
    messages would not meet: here the weights are gathered once a step, layer by layer, and the
    gradients summed once a step.

    Args:
        model: a Hugging Face model, whole and alike in every process.
        dtype: of the whole weights; None takes the shards' own.
    """

    def __init__(self, model: Any, *, dtype: torch.dtype | None = None) -> None:
        self._model, self._narrow = model, dtype is not None
        self._saved_names = list(model.state_dict())
        self._mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
        options: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": False,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False),
        }
        self._before = {module: _Before(module) for module in model.modules()}
        self._groups: list[FSDPModule] = [fully_shard(layer, **options) for layer in _layers(model)]
        self._groups.append(fully_shard(model, **options))
        # The hooks of a padded model's forward find the weights whole, and leave weights and
        # gradients alone.
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)
        self.weights: dict[str, Tensor] = {
            name: one for name, one in self._parameters() if one.requires_grad
        }
        self._gradients: dict[str, Tensor] = {}  # of narrow weights, in fp32
        self._is_whole = self._dissolved = False
        for before in self._before.values():
            before.note_added()

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters()

    def unshard(self) -> None:
        """Gather the weights; every process must call it."""
        if not self._is_whole:
            for group in self._groups:
                group.unshard()
            self._is_whole = True

    def reshard(self) -> None:
        """Let go of the whole weights, as what changes the shards must."""
        for group in self._groups:
            group.reshard()
        self._is_whole = False

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The weights are whole inside; every process must enter."""
        if self._is_whole:
            yield
            return
        self.unshard()
        hooks = []
        if self._narrow:
            trained = [(name, one) for name, one in self._parameters() if one.requires_grad]
            hooks = [
                one.register_post_accumulate_grad_hook(self._widen(name)) for name, one in trained
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.reshard()

    def dissolve(self) -> None:
        """Make it an ordinary model of the whole weights again; every process must call it.

        One that FSDP2 holds would fall back to its shards as soon as its state_dict is asked for.
        """
        if self._dissolved:
            return
        self.unshard()
        owned: dict[
            Tensor, nn.Parameter
        ] = {}  # by what is gathered, which FSDP2 lets go of; tied weights are one
        places = []
        for module in self._model.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    if one not in owned:
                        owned[one] = nn.Parameter(
                            one.detach().clone(), requires_grad=one.requires_grad
                        )
                    places.append((module, name, owned[one]))
        self.reshard()
        for before in self._before.values():
            before.put_back()
        for module, name, parameter in places:
            module._parameters[name] = parameter
        self._is_whole = self._dissolved = True

    def _widen(self, name: str) -> Any:
        """Narrow gradients of several backward passes are added up in fp32."""

        def move(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad.float(), None
            before = self._gradients.get(name)
            self._gradients[name] = gradient if before is None else before.add_(gradient)

        return move

    def forget_gradients(self) -> None:
        """Of narrow weights: those kept here in fp32."""
        self._gradients.clear()

    def sum_gradients(self) -> list[Tensor]:
        """Give every weight its part of the gradient, summed over all processes; inside `whole`.

        Returns:
            The parts, as plain tensors.
        """
        parts: list[Tensor] = []
        names = list(self.weights)
        whole = dict(self._parameters())
        for cut in messages(list(self.weights.values())):
            gradients = []
            for name in names[cut]:
                gradient, whole[name].grad = whole[name].grad, None
                gradient = self._gradients.pop(name, gradient)
                # Every process must take part, whether or not its share of the batch reached the
                # weight.
                if gradient is None:
                    gradient = torch.zeros_like(whole[name], dtype=torch.float32)
                gradients.append(gradient)
            parts += _reduce_scatter(gradients, self._mesh)
        for weight, part in zip(self.weights.values(), parts, strict=True):
            weight.grad = DTensor.from_local(
                part,
                self._mesh,
                [Shard(0)],
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
        return parts

    def state(self) -> dict[str, Tensor]:
        """What model.state_dict() would be without sharding; inside `whole`. The method itself
        would end that.
        """
        tensors = {
            **dict(self._model.named_parameters(remove_duplicate=False)),
            **dict(self._model.named_buffers(remove_duplicate=False)),
        }
        return {name: tensors[name].detach() for name in self._saved_names}

    def gathered(self, tensor: Tensor) -> Tensor:
        """All of a shard, in every process, each of which must call it; another tensor as it is."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part_of(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """The weight's part of a whole tensor that every process has."""
        if tensor.dim() == 0:  # the optimizer's count of steps
            return tensor
        assert isinstance(weight, DTensor)
        return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


class _Before:
    """A module's class, attributes and hooks before fully_shard, which has no way back of its
    own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind, self._names = module, type(module), set(vars(module))
        self._added: set[str] = set()
        self._hooks = {
            name: set(value) for name, value in vars(module).items() if _holds_hooks(name, value)
        }

    def note_added(self) -> None:
        """Which attributes fully_shard has set, before others set more."""
        self._added = vars(self._module).keys() - self._names

    def put_back(self) -> None:
        _module_state_mapping.pop(self._module, None)  # or fully_shard refuses the module for good
        self._module.__class__ = self._kind
        for name in self._added:
            vars(self._module).pop(name, None)
        for name, kept in self._hooks.items():
            hooks = vars(self._module)[name]
            for key in hooks.keys() - kept:
                del hooks[key]


def _holds_hooks(name: str, value: object) -> bool:
    return isinstance(value, dict) and "_hooks" in name


def _reduce_scatter(tensors: list[Tensor], mesh: DeviceMesh) -> list[Tensor]:
    """This process's rows of each tensor's sum over all processes, in one message; Shard(0) cuts
    rows so.
    """
    size, rank = mesh.size(), mesh.get_local_rank()
    rows = [-(-len(tensor) // size) for tensor in tensors]
    sent = torch.cat(
        [
            F.pad(tensor.reshape(len(tensor), -1), (0, 0, 0, count * size - len(tensor))).view(
                size, -1
            )
            for tensor, count in zip(tensors, rows, strict=True)
        ],
        dim=1,
    )
    summed = DTensor.from_local(sent, mesh, [Partial()], run_check=False).redistribute(
        placements=[Shard(0)]
    )
    sizes = [count * tensor[0].numel() for tensor, count in zip(tensors, rows, strict=True)]
    parts = summed.to_local()[0].split(sizes)
    mine = []
    for tensor, part, count in zip(tensors, parts, rows, strict=True):
        left = min(max(len(tensor) - rank * count, 0), count)
        mine.append(part.view(count, *tensor.shape[1:])[:left].clone())
    return mine


def _layers(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = [
        part for name, part in lists.items() if not any(name.startswith(f"{one}.") for one in lists)
    ]
    return [
        layer for part in outermost for layer in part if next(layer.parameters(), None) is not None
    ]

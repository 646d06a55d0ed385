"""What a program asks of a GPU, counted on meta tensors: launches, copies, reads, bytes,
arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# A kernel takes about this long whatever it does.
LEAST_SECONDS = 1.5e-6


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet, and the shares of it that are taken to be reached.

    Shares are of large copies and of products of these shapes (K from 384 to 3,072), not of the
    best ones: what is known from published measurements, to be mended by one's own.
    """

    name: str
    bytes_per_second: float
    narrow_flops: float  # bf16, dense, accumulated in fp32
    wide_flops: float  # fp32 without TF32
    memory_share: float
    product_share: float

    def seconds(self, operation: Operation) -> float:
        """Of the device, for one operation of a meta run."""
        peak = self.narrow_flops if operation.narrow else self.wide_flops
        return max(
            operation.bytes / (self.bytes_per_second * self.memory_share),
            operation.flops / (peak * self.product_share),
            operation.launches * LEAST_SECONDS,
        )


CARDS = (
    Card("H100 SXM", 3.35e12, 989e12, 67e12, 0.9, 0.45),
    Card("A100 SXM 80 GB", 2.04e12, 312e12, 19.5e12, 0.88, 0.6),
    Card("RTX 3090", 0.936e12, 71e12, 35.6e12, 0.9, 0.7),
    Card("RTX 4090", 1.008e12, 165e12, 82.6e12, 0.9, 0.7),
)


@dataclass(frozen=True)
class Operation:
    """One call that reached the device."""

    name: str
    launches: int
    bytes: int  # read and written
    flops: int = 0  # of products and attention
    narrow: bool = True  # their operands have 16 bits
    replayed: bool = False  # inside a graph, which the host launches at once


@dataclass
class Tally:
    """Of one phase."""

    operations: list[Operation] = field(default_factory=list)
    uploads: int = 0  # copies from host to device
    uploaded_bytes: int = 0
    waits: int = (
        0  # copies of pageable memory to the device, and every copy from it: the host waits
    )
    reads: int = (
        0  # values of the device that the host asks for: it waits for all that was launched
    )
    replays: list[int] = field(default_factory=list)  # of graphs: the kernels of each

    @property
    def launched(self) -> list[Operation]:
        """Those that the host launches one by one."""
        return [one for one in self.operations if not one.replayed]

    @property
    def launches(self) -> int:
        """By the host, of which a graph's replay is one."""
        return sum(one.launches for one in self.launched) + len(self.replays)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.operations)

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.operations)

    @property
    def syncs(self) -> int:
        return self.waits + self.reads

    def seconds_by_name(self, card: Card) -> dict[str, float]:
        """Of each operation on a card, longest first."""
        summed: dict[str, float] = {}
        for one in self.operations:
            summed[one.name] = summed.get(one.name, 0.0) + card.seconds(one)
        return dict(sorted(summed.items(), key=lambda item: -item[1]))

    def by_name(self) -> dict[str, int]:
        """Launches of each operation, most first."""
        counted: Counter[str] = Counter()
        for one in self.launched:
            counted[one.name] += one.launches
        if self.replays:
            counted["replay of a graph"] = len(self.replays)
        return dict(counted.most_common())

    def seconds(self, card: Card) -> float:
        return sum(map(card.seconds, self.operations))


_NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
}
# Kernels of an operation on CUDA, where they are not one. Sorting is a radix sort of 32-bit keys.
_KERNELS = {
    "varlen_attention_backward": 2,
    "attention_grads": 2,
    "residual_norm_backward": 2,  # the last one sums what the programs found for weight and bias
    "score_head_backward": 2,
    "lambda_loss": 2,
    "embedding_dense_backward": 10,
    "index_put_": 8,
    "index_put": 9,
    "_index_put_impl_": 8,
    "index_add": 2,
    "sort": 4,
    "argsort": 4,
    "repeat_interleave": 2,
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "select_backward": 2,
    "slice_backward": 2,
}
# Launched by Triton: through its launcher in Python.
TRITON = {
    f"{name}{suffix}"
    for name in ("varlen_attention", "residual_norm", "score_head", "lambda_loss", "approx_ranks")
    for suffix in ("", "_backward")
}
TRITON |= {"attention_grads", "residual_norm_grads", "gelu_grad", "column_sums", "segment_sums"}
TRITON |= {
    f"{name}{suffix}"
    for name in ("add_norm", "embed_norm", "rotary", "gated")
    for suffix in ("", "_grad", "_grads")
}
_BEGINS = {"lambda_loss": "loss"}  # a phase of its own
_WRITES_ONLY = {"copy_", "fill_", "zero_", "_foreach_copy_", "bernoulli_", "normal_", "uniform_"}
_GATHERS = {"embedding", "index_select", "index", "gather"}
# How often each row that the index names is read or written.
_SCATTERS = {
    "index_copy_": 1,
    "index_add_": 2,
}
# torch's multi_tensor_apply: the most tensors of a launch by the lists it takes, its most blocks,
# and their elements.
_MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_MOST_BLOCKS, _BLOCK = 320, 65536


def multi_tensor_launches(sizes: list[int], lists: int) -> int:
    """Launches of a torch._foreach or fused optimizer's kernel over tensors of these numbers of
    elements."""
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        for _ in range(math.ceil(size / _BLOCK)):
            blocks += 1
            if blocks == _MOST_BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == _MOST_TENSORS[lists]:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


class DeviceCounts(TorchDispatchMode):
    """Counts in phases what meta tensors are asked to do, as if they lay on a GPU.

    Views and allocations are no launches. A copy with non_blocking is one of pinned memory, as it
    is in this package. What the host reads is 0.

    Args:
        lengths: (N,) tokens of each sequence: what attention does follows from them.
    """

    def __init__(self, lengths: np.ndarray) -> None:
        super().__init__()
        self.lengths = lengths
        self.forget_casts: Callable[[], None] = lambda: None  # as where an autocast region ends
        self.phases: dict[str, Tally] = {}
        self.begin("")

    def begin(self, phase: str) -> None:
        """From here on what comes is counted there."""
        self.tally = self.phases.setdefault(phase, Tally())

    @contextmanager
    def capturing(self) -> Iterator[list[Operation]]:
        """What is counted inside is none of the phase's: replay() adds it."""
        captured: list[Operation] = []
        before = self.tally
        self.tally = Tally()
        try:
            yield captured
        finally:
            counted, self.tally = self.tally, before
        if counted.uploads or counted.syncs:
            raise ValueError("expected launches alone in a graph, got a copy or a read of a value")
        captured += [replace(one, replayed=True) for one in counted.operations]

    def replay(self, captured: list[Operation]) -> None:
        self.tally.operations += captured
        self.tally.replays.append(sum(one.launches for one in captured))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if torch.is_inference_mode_enabled():  # where operations come before they are taken apart
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if name in _BEGINS:
            self.begin(_BEGINS[name])
        if name in ("_to_copy", "copy_"):
            known, result = self._copy(name, args, kwargs)
            if known:
                return result
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.tally.reads += 1
            return torch.zeros((), dtype=args[0].dtype).item()
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if name in _NO_KERNEL or not (inputs or outputs) or _is_view(func):
            return out
        operands = [one for one in inputs if one.dim() == 2 or func.namespace == "rerank_fast"]
        self.tally.operations.append(
            Operation(
                name,
                self._launches(name, args, inputs),
                _bytes(func, args, kwargs, inputs, outputs),
                self._flops(func, args, kwargs, out),
                narrow=not operands or min(one.dtype.itemsize for one in operands) <= 2,
            )
        )
        return out

    def _copy(self, name: str, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Whether it goes from one device to the other, and then the result."""
        if name == "copy_":
            to, source = args[:2]
            device = to.device
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, device, non_blocking = (
                args[0],
                kwargs.get("device"),
                kwargs.get("non_blocking", False),
            )
        if device is None or torch.device(device).type == source.device.type:
            return False, None
        if source.is_meta:
            self.tally.waits += 1
            if name == "copy_":
                return True, to.zero_()
            return True, torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        self.tally.uploads += 1
        self.tally.uploaded_bytes += source.numel() * source.element_size()
        self.tally.waits += not non_blocking
        if name == "copy_":
            return True, to
        return True, torch.empty(
            source.shape, dtype=kwargs.get("dtype") or source.dtype, device="meta"
        )

    def _launches(self, name: str, args: Any, inputs: list[Tensor]) -> int:
        if name.startswith(("_foreach_", "_fused_")):
            lists = [
                one
                for one in args
                if isinstance(one, list | tuple) and one and isinstance(one[0], Tensor)
            ]
            # The steps that a fused optimizer counts are no list of its kernel.
            depth = min(max(len(lists), 1), 4)
            launches = multi_tensor_launches([one.numel() for one in lists[0]], depth)
            return launches + (name == "_foreach_norm")  # which adds its blocks up
        return _KERNELS.get(name, 1)

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        name = func._opname
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[1:3] if "add" in name else args[:2]
            return 2 * left.numel() * right.shape[-1]
        if name.startswith("_scaled_dot_product"):
            return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        if func.namespace == "rerank_fast" and "attention" in name:
            query, key = args[:2]
            backward = not name.endswith("attention")
            # One query of each sequence reads all that there is.
            read = key.shape[0] / max(query.shape[0], 1)
            if query.shape[0] == key.shape[0]:
                # Behind the scale, which is the first number.
                first = next(place for place, one in enumerate(args) if isinstance(one, float))
                read = self._keys_a_query(*args[first + 1 : first + 3])
            # Two products forward; backward each of two kernels computes the probabilities anew.
            return int((14 if backward else 4) * query.numel() * read)
        return 0

    def _keys_a_query(self, left: int, right: int) -> float:
        """In the mean, where every token is one, with a window of so many to each side or -1."""
        lengths = self.lengths.astype(np.float64)
        sides = [(lengths - 1) / 2 if side < 0 else side for side in (left, right)]
        return float((np.minimum(lengths, sum(sides) + 1) * lengths).sum() / lengths.sum())


def _tensors(tree: Any) -> list[Tensor]:
    """On the device; a tensor that comes twice once."""
    found = {id(one): one for one in tree_leaves(tree) if isinstance(one, Tensor) and one.is_meta}
    return list(found.values())


def _is_view(func: Any) -> bool:
    results = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in results)


def _bytes(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = {id(one): one for one in outputs}
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            written |= {id(one): one for one in _tensors(given)}
    read = inputs
    if func._opname in _WRITES_ONLY:
        read = [one for one in inputs if id(one) not in written]
    if func._opname.startswith(
        "embed_norm"
    ):  # of the tables a row for each of the tokens, which lie in (3, T)
        gathered = args[3].shape[1] * sum(
            row.shape[1] * row.element_size() for row in args[:3] if row is not None
        )
        return gathered + sum(map(_stored, read[3:])) + sum(map(_stored, written.values()))
    if func._opname in _SCATTERS:
        index, source = args[2:4]
        return _stored(index) + (1 + _SCATTERS[func._opname]) * _stored(source)
    if func._opname in _GATHERS:  # of the table what the index asks for
        read = [*inputs[1:], *outputs]
    return sum(map(_stored, read)) + sum(map(_stored, written.values()))


def _stored(tensor: Tensor) -> int:
    """Bytes of a tensor in memory, where a dimension may be expanded."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


class AsOnCuda(TorchFunctionMode):
    """Calls that choose their kernels by the device, as they choose them on CUDA.

    Args:
        autocast: to a dtype, of linear layers and attention, and norms in fp32: torch.autocast
            knows no meta tensors. A weight is cast once, until forget.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self.forget()

    def forget(self) -> None:
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            x, p, training = _bound(args, kwargs, ("input", 0), ("p", 0.5), ("training", True))
            return torch.native_dropout(x, p, True)[0] if training and p > 0 and x.is_meta else x
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.autocast is not None and func is F.linear:
            x, weight, bias = _bound(args, kwargs, ("input", 0), ("weight", 0), ("bias", None))
            return func(
                self._narrow(x), self._weight(weight), None if bias is None else self._weight(bias)
            )
        if self.autocast is not None and func is F.layer_norm:
            return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _narrow(self, x: Tensor) -> Tensor:
        return x if self.autocast is None else x.to(self.autocast)

    def _weight(self, weight: Tensor) -> Tensor:
        if id(weight) not in self._cast:
            self._cast[id(weight)] = weight, self._narrow(weight)
        return self._cast[id(weight)][1]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value = map(self._narrow, (query, key, value))
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        bias = None
        if attn_mask is not None:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                ~attn_mask, -math.inf
            )
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        run = torch.ops.aten._scaled_dot_product_efficient_attention
        return run(
            query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]


def _bound(args: Any, kwargs: Any, *parameters: tuple[str, Any]) -> list[Any]:
    """The values of a call's first parameters."""
    return [
        args[index] if index < len(args) else kwargs.get(name, default)
        for index, (name, default) in enumerate(parameters)
    ]


@contextmanager
def counting(lengths: np.ndarray, *, autocast: torch.dtype | None = None) -> Iterator[DeviceCounts]:
    """Count what happens inside."""
    _complete_torch()
    with AsOnCuda(autocast) as calls, DeviceCounts(lengths) as counts:
        counts.forget_casts = calls.forget
        yield counts
    counts.phases = {
        name: one for name, one in counts.phases.items() if one.operations or one.uploads
    }


_LIBRARIES: list[Any] = []


def _complete_torch() -> None:
    """A product with a dtype of its own for the result has no meta kernel in torch 2.13."""
    if _LIBRARIES or torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", "Meta"):
        return
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("mm.dtype", _mm_dtype)
    _LIBRARIES.append(library)


def _mm_dtype(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=dtype)

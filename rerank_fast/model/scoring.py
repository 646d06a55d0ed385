"""Tokenised pairs to scores: packed where the architecture allows it, else padded. Both keep the graph."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rerank_fast.model.architectures import (
    Architecture,
    find_answer_head,
    find_architecture,
    reason_to_pad,
)
from rerank_fast.model.compilation import Compiler
from rerank_fast.model.devices import empty_cache
from rerank_fast.model.encoder import PackedStep, ReadyLayers
from rerank_fast.model.heads import AnswerHead, Answers, cut_head
from rerank_fast.model.modular.reranker import ModularReranker
from rerank_fast.model.packing import MAX_TOKENS, TokenizedPairs, most_tokens, plan_micro_batches, row_count, upload
from rerank_fast.model.precision.hardware import arithmetic, name_of, why_slow

logger = logging.getLogger(__name__)

_said: set[str] = set()


class PaddedStep:
    """What PackedStep does, through the model's own forward on padded micro-batches."""

    padded = True
    draws_by_row = False  # dropout masks are drawn for a micro-batch as a whole

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: TokenizedPairs,
        *,
        dtype: torch.dtype,
        recomputes: bool = False,
        answers: Answers | None = None,
    ) -> None:
        self.model, self.tokenizer, self.tokens = model, tokenizer, tokens
        self.device = model.device
        self.width = int(getattr(model.config, "hidden_size", 1024))  # a large one where it is not said
        self.head = None if answers is None else find_answer_head(model, answers)
        self.answers = answers
        own = next(model.parameters()).dtype
        autocasts = dtype not in (own, torch.float32)
        # oneDNN keeps half a megabyte for every shape that a bf16 weight was ever multiplied with: see fill_up.
        masked = "attention_mask" in inspect.signature(model.forward).parameters  # else padding is read
        self.keeps_shapes = model.device.type == "cpu" and dtype == torch.bfloat16 and masked
        # One region for all micro-batches of a step: autocast then casts the weights once.
        self.region = torch.autocast(model.device.type, dtype if autocasts else None, enabled=autocasts)
        # Autocast only narrows. Checkpointing would compute again with the model's own weights.
        self.widened: dict[str, Tensor] = {}
        if own.itemsize < dtype.itemsize and not recomputes:
            self.widened = {
                f"model.{name}": one.to(dtype)
                for name, one in (*model.named_parameters(), *model.named_buffers())
                if one.is_floating_point() and one.dtype.itemsize < dtype.itemsize
            }

    def __call__(self, indices: np.ndarray, keep: np.ndarray | None = None) -> Tensor:
        """As PackedStep's; with keep all pairs are computed nevertheless."""
        if self.keeps_shapes:
            scores = torch.cat([self._scores(part) for part in _powers_of_two(indices)])
        else:
            scores = self._scores(indices)
        return scores if keep is None else scores.index_select(0, upload(np.flatnonzero(keep), scores.device))

    def _scores(self, indices: np.ndarray) -> Tensor:
        """(B,) scores of one padded batch."""
        width = self._width(int(self.tokens.lengths[indices].max(initial=1)))
        inputs = padded(self.tokens, indices, self.model, self.tokenizer, width=width, device=self.device)
        called = inputs, self.answers, self.head
        if self.widened:
            return functional_call(_Padded(self.model), self.widened, called)
        return padded_scores(self.model, *called)

    def _width(self, longest: int) -> int:
        """Of a batch whose longest pair has this many tokens."""
        if not self.keeps_shapes:
            return longest
        positions = getattr(self.model.config, "max_position_embeddings", None) or longest
        return max(longest, min(row_count(longest), positions))

    def separate(self) -> list[tuple[Tensor, Tensor]]:
        """As PackedStep.separate."""
        return cut_head(self.head)


def _powers_of_two(indices: np.ndarray) -> list[np.ndarray]:
    """The (B,) indices in order, in parts whose sizes are powers of two, the largest first."""
    parts = []
    while len(indices):
        size = 1 << (len(indices).bit_length() - 1)
        parts.append(indices[:size])
        indices = indices[size:]
    return parts


class _Padded(nn.Module):
    """padded_scores as a module, for weights in the place of the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Tensor], answers: Answers | None, head: AnswerHead | None) -> Tensor:
        return padded_scores(self.model, inputs, answers, head)


def padded(
    tokens: TokenizedPairs,
    indices: np.ndarray,
    model: Any,
    tokenizer: Any,
    *,
    width: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """The pairs at the (B,) indices as a batch that the model takes, padded with what it knows for padding."""
    pad = _padding_token(model)
    return tokens.pad(
        indices,
        pad_token_id=(tokenizer.pad_token_id or 0) if pad is None else pad,
        padding_side=tokenizer.padding_side,
        pad_token_type_id=tokenizer.pad_token_type_id,
        width=width,
        device=device,
    )


def _padding_token(model: Any) -> int | None:
    """The number of the token by which the model itself tells padding from text; None where it knows none."""
    pad = getattr(model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else None


def padded_scores(
    model: Any, inputs: Mapping[str, Tensor], answers: Answers | None, head: AnswerHead | None = None
) -> Tensor:
    """(B,) fp32 scores of a padded batch, left-padded where there are answers; head is that of find_answer_head."""
    if answers is None:
        mask = inputs["attention_mask"].bool()
        # A modular model reads what the mask says, not what it knows for padding.
        if len(mask) > 1 and _padding_token(model) is None and not isinstance(model, ModularReranker):
            _say_one_by_one(type(model).__name__)
            rows = [{name: one[n : n + 1, mask[n]] for name, one in inputs.items()} for n in range(len(mask))]
            return torch.cat([padded_scores(model, row, None) for row in rows])
        return model(**inputs).logits.reshape(-1).float()
    if head is None:
        return answers.score(model(**inputs, logits_to_keep=1).logits[:, -1]).float()
    return head(model.base_model(**inputs).last_hidden_state[:, -1]).float()


class StepMaker:
    """Makes steps of a model whose modules stay what and where they are: their parts are found once.

    Weights, the mode of training and whether gradients are on may change from step to step. After a
    module, a hook or an adapter has come or gone it needs a new one. Steps with gradients share the
    copies of weights that they make: a step must be gone back through before the next is made.

    Args:
        model: a Hugging Face sequence-classification model with one label, or a causal language model.
        tokenizer: of the model; says how to pad.
        dtype: of matrix products and attention; None takes the weights' own, or fp32 where the processor
            only emulates that. bf16 beside fp32 weights is what autocast does.
        packed: False pads whatever the architecture.
        packed_dtype: where dtype is None, of packed execution only: not every model can be autocast.
        answers: of a causal language model.
        compiler: of packed execution; see PackedStep.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        dtype: torch.dtype | None = None,
        packed: bool = True,
        packed_dtype: torch.dtype | None = None,
        answers: Answers | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.dtype, self.packed_dtype = dtype, dtype or packed_dtype
        self.answers, self.compiler = answers, compiler
        self.recomputes = _recomputes(model)
        self._ready: ReadyLayers | None = None  # of steps with gradients
        self.architecture = find_packed(model, self.packed_dtype, answers) if packed else None

    def __call__(self, tokens: TokenizedPairs) -> PackedStep | PaddedStep:
        """What scores the pairs of one step, micro-batch by micro-batch, with the weights as they are now.

        Args:
            tokens: all pairs of the step.

        Raises:
            ValueError: a pair has no token; names it.
        """
        if len(empty := np.flatnonzero(tokens.lengths == 0)):
            raise ValueError(f"pair {empty[0]} has no token: expected at least one to read a score from")
        recomputes = self.recomputes and self.model.training
        if self.architecture is None:
            return PaddedStep(
                self.model,
                self.tokenizer,
                tokens,
                dtype=self.dtype or _own_dtype(self.model),
                recomputes=recomputes,
                answers=self.answers,
            )
        dtype = self.packed_dtype or _own_dtype(self.model)
        if torch.is_grad_enabled() and (self._ready is None or not self._ready.is_current(dtype)):
            self._ready = ReadyLayers(
                self.architecture, dtype, len(tokens.input_ids), compiles=self.compiler is not None
            )
        architecture = self.architecture
        if self.answers is not None:  # this head has rows of the weights
            head = find_answer_head(self.model, self.answers)
            assert head is not None
            architecture = replace(architecture, head=head)
        return PackedStep(
            architecture,
            tokens,
            dtype=dtype,
            gradient_checkpointing=recomputes,
            compiler=self.compiler,
            ready=self._ready if torch.is_grad_enabled() else None,
        )


def make_packed_step(model: Any, tokens: TokenizedPairs, **options: Any) -> PackedStep | None:
    """The one step of a StepMaker, or None, and one line in the log, where the model can't run packed."""
    make = StepMaker(model, None, **options)
    step = None if make.architecture is None else make(tokens)
    return step if isinstance(step, PackedStep) else None


def find_packed(model: Any, dtype: torch.dtype | None, answers: Answers | None = None) -> Architecture | None:
    """The parts of a model that runs packed in a dtype, None for its own; None, and one line in the log, for one
    that can't.
    """
    weights_dtype = next(model.parameters()).dtype
    dtype = dtype or _own_dtype(model)
    halves = {torch.bfloat16} if model.device.type == "cpu" else {torch.bfloat16, torch.float16}
    served = model.device.type in ("cpu", "cuda", "meta") and dtype in {torch.float32, *halves}
    if not served or weights_dtype.itemsize > torch.float32.itemsize:
        say_once(f"packed execution has no kernels for {dtype} on {model.device.type}")
        return None
    architecture = find_architecture(model, answers)
    if architecture is None:
        say_once(reason_to_pad(model, answers))
    return architecture


def _own_dtype(model: Any) -> torch.dtype:
    """What a model's weights are computed in here."""
    weights = next(model.parameters()).dtype
    dtype = arithmetic(weights, model.device)
    if dtype != weights:
        _say_wide(weights, model.device)
    return dtype


@functools.cache
def _say_one_by_one(name: str) -> None:
    logger.warning(
        "This %s has no padding token: pairs are scored one by one. A pad_token_id in config.json allows batches.",
        name,
    )


@functools.cache
def _say_wide(weights: torch.dtype, device: torch.device) -> None:
    """One line in the log for a dtype, however many models have it."""
    why = why_slow(weights, device)
    logger.warning("Weights in %s are computed in float32 here: %s.", name_of(weights), why)


def run(
    step: PackedStep | PaddedStep,
    *,
    max_pairs: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """(N,) fp32 scores of all pairs of a step, in their order, on the model's device.

    Args:
        step: from a StepMaker.
        max_pairs: most pairs in a micro-batch; None sets no limit.
        max_tokens: most tokens in a micro-batch, with the padding where there is any; None and no max_pairs takes
            what keeps the device busy and fits its memory.
        progress: told the number of pairs of every micro-batch that is done.

    Raises:
        MemoryError: a micro-batch does not fit memory, nor does either half of it.
    """
    if max_pairs is None and max_tokens is None:
        max_tokens = _default_max_tokens(step)
    if step.tokens.input_ids.size > MAX_TOKENS:
        _keep_freed_memory()
    plan = plan_micro_batches(step.tokens.lengths, max_pairs=max_pairs, max_tokens=max_tokens, padded=step.padded)
    if not plan:
        return torch.zeros(0)
    parts = []
    with step.region:
        for indices in plan:
            parts.append(_score_or_halve(step, indices))
            if progress is not None:
                progress(len(indices))
    return in_order(parts, plan)


class _Permuted(torch.autograd.Function):
    """index_select of each row once: its gradient is one too, and needs no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.back), None, None


def in_order(parts: list[Tensor], plan: Sequence[np.ndarray]) -> Tensor:
    """(N,) scores of all micro-batches in the order of the pairs."""
    planned = np.concatenate(plan)
    back, order = upload(np.stack([planned, np.argsort(planned)]), parts[0].device)
    return _Permuted.apply(parts[0] if len(parts) == 1 else torch.cat(parts), order, back)


# About what a token takes in a forward pass that keeps no graph, in bytes a unit of the model's
# width: the residual stream in fp32, and the widest products of a layer beside what they read.
_BYTES_PER_UNIT = 64


def _default_max_tokens(step: PackedStep | PaddedStep) -> int:
    """Tokens of a micro-batch where nobody says how many; half of a GPU's free memory must hold them."""
    device = step.device
    most = most_tokens(device)
    if device.type != "cuda" or step.tokens.input_ids.size <= MAX_TOKENS:
        return most
    # What torch keeps for itself is free for torch.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept
    return max(min(most, free // 2 // (_BYTES_PER_UNIT * step.width)), 1)


@functools.cache
def _keep_freed_memory() -> None:
    """Once a process: the C library then keeps what a layer frees for the next one.

    glibc returns freed memory to the system beyond twice the largest block that was ever mapped and freed, and gets
    it back page by page, cleared: a twentieth of a forward pass in bf16. 32 MiB is the largest that counts; it is
    never written.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _score_or_halve(step: PackedStep | PaddedStep, indices: np.ndarray) -> Tensor:
    """A micro-batch's scores; one that does not fit memory is tried once more in two halves."""
    try:
        return step(indices)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = int(step.tokens.lengths[indices].sum())
        size = f"{len(indices)} pairs with {tokens} tokens"
    # Outside of the except clause: its traceback would keep the failed forward's tensors.
    empty_cache(step.device)
    if len(indices) > 1:
        logger.warning("A batch of %s does not fit memory; it is scored in two halves.", size)
        try:
            return torch.cat([step(half) for half in np.array_split(indices, 2)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size += ", in halves too,"
    raise MemoryError(f"a batch of {size} does not fit memory: expected a smaller batch_size or max_length")


# Where it is no torch.OutOfMemoryError: as PyTorch's allocator, C++'s and oneDNN say it on a CPU (a
# primitive's descriptor that can't be created is one that the processor has no code for); drivers and
# runtimes of GPUs ("CUDA error: out of memory", "Triton Error [HIP]: out of memory", "MPS backend out of
# memory", "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), and their libraries, which allocate past PyTorch.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|bad_alloc|could not create a primitive(?! descriptor)"
    r"|out of memory|OUT_OF_(DEVICE_|HOST_)?MEMORY|_ALLOC(ATION)?_FAILED"
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory|rocblas_status_memory_error"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return _NO_MEMORY.search(str(error)) is not None


def _recomputes(model: nn.Module) -> bool:
    """Whether layers compute their activations again in the backward pass, in training."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def say_once(reason: str) -> None:
    """One line in the log for a reason to pad, however often it holds."""
    if reason not in _said:
        _said.add(reason)
        logger.warning("Pairs are padded and sorted by length: %s.", reason)

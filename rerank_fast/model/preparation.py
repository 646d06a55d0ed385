"""Tokenised pairs ready to be scored: packed where the architecture allows it, else padded."""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from rerank_fast.model.packed.architectures import (
    Architecture,
    find_answer_head,
    find_architecture,
    reason_to_pad,
)
from rerank_fast.model.packed.bucket_encoder import BucketEncoder, refuse
from rerank_fast.model.packed.compilation import Compiler
from rerank_fast.model.packed.encoder import PackedPairs
from rerank_fast.model.packed.graphs import ScoringGraphs, TrainingGraphs
from rerank_fast.model.packed.heads import Answers
from rerank_fast.model.packed.ready_layers import ReadyLayers
from rerank_fast.model.padded import PaddedPairs
from rerank_fast.model.precision.hardware import arithmetic, name_of, why_slow
from rerank_fast.model.tokens.packing import (
    TokenizedPairs,
)

logger = logging.getLogger(__name__)

_said: set[str] = set()

Prepared: TypeAlias = PackedPairs | PaddedPairs


class Preparer:
    """Prepares pairs of a model whose modules stay what and where they are: their parts are found
    once.

    Weights, the mode of training and whether gradients are on may change from call to call. After a
    module, a hook or an adapter has come or gone a new one is needed. Pairs prepared with gradients
    on share the copies of weights: their backward pass must be done before the next are prepared.

    Args:
        model: a Hugging Face sequence-classification model with one label, or a causal language
            model.
        tokenizer: of the model; says how to pad.
        dtype: of matrix products and attention; None takes the weights' own, or fp32 where the
            processor only emulates that. bf16 beside fp32 weights is what autocast does.
        packed: False pads whatever the architecture.
        packed_dtype: where dtype is None, of packed execution only: not every model can be
            autocast.
        answers: of a causal language model.
        compiler: of packed execution; see PackedPairs.
        adds_gradients: layers that train as one function add the gradients of their weights to
            `.grad` themselves, and each time call what register_post_accumulate_grad_hook left
            there: for scores that only backward() goes back through, with no inputs named.
        graph_seed: of the dropout of layers that are captured as CUDA graphs, for such scores; None
            captures none. See TrainingGraphs.
        captures: of packed execution without gradients: layers are captured as CUDA graphs. See
            ScoringGraphs.
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
        adds_gradients: bool = False,
        graph_seed: int | None = None,
        captures: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.adds_gradients, self.graph_seed = adds_gradients, graph_seed
        self._graphs: TrainingGraphs | None = None
        self.captures, self._lock = captures, threading.Lock()
        self._scoring: tuple[ReadyLayers, ScoringGraphs] | None = None
        self.dtype, self.packed_dtype = dtype, dtype or packed_dtype
        self.answers, self.compiler = answers, compiler
        self.recomputes = _recomputes(model)
        self._ready: ReadyLayers | None = None  # where gradients are on
        self.architecture = find_packed(model, self.packed_dtype, answers) if packed else None

    def __call__(self, tokens: TokenizedPairs) -> Prepared:
        """The pairs ready to be scored, micro-batch by micro-batch, with the weights as they are
        now.

        Args:
            tokens: all pairs that share the copies of weights, as those of one optimizer step.

        Raises:
            ValueError: a pair has no token; names it.
        """
        if len(empty := np.flatnonzero(tokens.lengths == 0)):
            raise ValueError(
                f"pair {empty[0]} has no token: expected at least one to read a score from"
            )
        recomputes = self.recomputes and self.model.training
        if self.architecture is None:
            return PaddedPairs(
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
                self.architecture,
                dtype,
                len(tokens.input_ids),
                compiles=self.compiler is not None,
                adds_gradients=self.adds_gradients and self.graph_seed is None,
            )
            if self.graph_seed is not None:
                layers = self._ready.layers
                encoder = BucketEncoder(
                    self.model, self.architecture, layers, dtype, seed=self.graph_seed
                )
                self._graphs = TrainingGraphs(encoder)
        ready: ReadyLayers | None = None
        graphs: TrainingGraphs | ScoringGraphs | None = None
        if torch.is_grad_enabled():
            ready, graphs = self._ready, self._graphs
        elif self.captures:
            ready, graphs = self.scoring(len(tokens.input_ids))
        architecture = self.architecture
        if self.answers is not None:  # this head has rows of the weights
            head = find_answer_head(self.model, self.answers)
            assert head is not None
            architecture = replace(architecture, head=head)
        return PackedPairs(
            architecture,
            tokens,
            dtype=dtype,
            gradient_checkpointing=recomputes,
            compiler=self.compiler,
            ready=ready,
            graphs=graphs,
        )

    def scoring(self, num_tokens: int = 0) -> tuple[ReadyLayers, ScoringGraphs]:
        """Layers without gradients that last, and their graphs.

        Args:
            num_tokens: about how many the first call has.

        Raises:
            ValueError: something in the model can't be captured; it is named.
        """
        if self.architecture is None:
            refuse("a model that runs padded")
        dtype = self.packed_dtype or _own_dtype(self.model)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._scoring is None or not self._scoring[0].is_current(dtype):
                ready = ReadyLayers(
                    self.architecture, dtype, num_tokens, compiles=False, lasts=True
                )
                encoder = BucketEncoder(
                    self.model, self.architecture, ready.layers, dtype, seed=None
                )
                self._scoring = ready, ScoringGraphs(encoder)
            return self._scoring


def prepare_packed(model: Any, tokens: TokenizedPairs, **options: Any) -> PackedPairs | None:
    """What a Preparer makes of them, or None, and one line in the log, where the model can't run
    packed.
    """
    make = Preparer(model, None, **options)
    step = None if make.architecture is None else make(tokens)
    return step if isinstance(step, PackedPairs) else None


def find_packed(
    model: Any, dtype: torch.dtype | None, answers: Answers | None = None
) -> Architecture | None:
    """The parts of a model that runs packed in a dtype, None for its own; None, and one line in the
    log, for one that can't.
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
def _say_wide(weights: torch.dtype, device: torch.device) -> None:
    """One line in the log for a dtype, however many models have it."""
    why = why_slow(weights, device)
    logger.warning("Weights in %s are computed in float32 here: %s.", name_of(weights), why)


def _recomputes(model: nn.Module) -> bool:
    """Whether layers compute their activations again in the backward pass, in training."""
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def say_once(reason: str) -> None:
    """One line in the log for a reason to pad, however often it holds."""
    if reason not in _said:
        _said.add(reason)
        logger.warning("Pairs are padded and sorted by length: %s.", reason)

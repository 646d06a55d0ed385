"""Lists to gradients, as a run's settings and its memory say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rerank_fast.data.tokenized import TokenizedLists
from rerank_fast.model.cross_encoder import CrossEncoder
from rerank_fast.model.devices import empty_cache
from rerank_fast.model.gradient_cache import Final, Loss, backward_cached, backward_direct
from rerank_fast.model.packed.graphs import has_graphs
from rerank_fast.model.preparation import Preparer
from rerank_fast.model.random_state import random_state, set_random_state
from rerank_fast.model.scoring import is_out_of_memory
from rerank_fast.model.tokens.packing import plan_micro_batches, upload
from rerank_fast.objectives.base import Objective, Units
from rerank_fast.training.collapse import spread_of_lists
from rerank_fast.training.config import TrainingConfig
from rerank_fast.training.distributed import collectives
from rerank_fast.training.memory import activation_bytes, available_bytes
from rerank_fast.training.precision import products_in
from rerank_fast.training.run_log import Rates

logger = logging.getLogger(__name__)


class Backward:
    """Adds the gradients of lists to a model's weights.

    Args:
        model: whose weights get the gradients.
        config: micro-batches, precision; gradient_cache "auto" keeps all graphs while they are
            estimated to fit half of the memory that is free now (see activation_bytes).
        objective: the loss.
        scale: multiplies the loss before it goes back.
        forget: takes back what has been added.
        max_tokens: of a micro-batch.
        final: called before the last backward of a step; see gradient_cache.Final.

    Raises:
        ValueError: CUDA graphs are asked for where there are none.
    """

    def __init__(
        self,
        model: CrossEncoder,
        config: TrainingConfig,
        objective: Objective,
        scale: Loss,
        forget: Callable[[], None],
        max_tokens: int,
        final: Final = lambda shared: None,
    ) -> None:
        self.model, self.config, self.objective = model, config, objective
        self.scale, self.forget, self.final = scale, forget, final
        self.max_tokens = max_tokens
        self.dtype = products_in(config, model.device)
        self._graph_seed = _graph_seed(config, model.device)
        # Gradients and both of AdamW's moments are still to come, 4 bytes each.
        state = 12 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self.memory = (available_bytes(model.device) - state) // 2
        self._prepare: Preparer | None = None
        self._most_tokens = 0  # of a micro-batch so far in this step
        self._scored: list[tuple[Tensor, Tensor]] = []  # scores and offsets of this step's parts

    def __call__(
        self, parts: Sequence[TokenizedLists], units: Units, rates: Rates
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the loss of all parts, which is over the units of their global batch;
        one that does not fit memory is begun anew, once, with half the tokens in a micro-batch,
        which from then on hold.

        Returns:
            The loss, and the units that a cut by rank leaves (0 without one), both () on the
            device.

        Raises:
            MemoryError: it does not fit either.
        """
        device = self.model.device
        state, before = random_state(device), replace(rates)
        try:
            return self._add(parts, units, rates)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except clause: its traceback would keep the failed graphs.
        self._begin_anew(rates, before)
        set_random_state(state, device)
        cached = (
            ", and one micro-batch's graph at a time"
            if self.config.gradient_cache == "auto"
            else ""
        )
        tokens, self.max_tokens, self.memory = self._most_tokens, max(self._most_tokens // 2, 1), -1
        logger.warning(
            "A step with micro-batches of %d tokens does not fit memory: from here on with %d%s.",
            tokens,
            self.max_tokens,
            cached,
        )
        try:
            return self._add(parts, units, rates)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._begin_anew(rates, before)
        advice = {
            "off": "gradient_cache on",
            "auto": "a smaller max_length",
            "on": "a smaller max_length",
        }
        also = "" if self.config.gradient_checkpointing else "gradient_checkpointing, "
        raise MemoryError(
            f"a step does not fit memory, nor with micro-batches of {self.max_tokens} tokens: "
            f"expected {also}{advice[self.config.gradient_cache]} or a smaller model"
        )

    def state_dict(self) -> dict[str, int]:
        """What the machine and the steps so far have made of the settings."""
        return {"max_tokens_per_microbatch": self.max_tokens, "memory": self.memory}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if self.config.max_tokens_per_microbatch is None:
            # Another cut of a batch drops out and rounds differently, and this machine may be
            # another.
            self.max_tokens = state["max_tokens_per_microbatch"]
        if (
            state["memory"] <= 2 * self.memory
        ):  # half of what was free: that much may be taken here too
            self.memory = state["memory"]

    def spread(self) -> Tensor:
        """(4,) on the device: how far apart the last step's scores lie in their lists; see
        spread_of_lists.
        """
        rounding = torch.finfo(self.dtype).eps
        parts = [spread_of_lists(scores, offsets, rounding) for scores, offsets in self._scored]
        return torch.stack(parts).sum(dim=0) if parts else torch.zeros(4, device=self.model.device)

    def _begin_anew(self, rates: Rates, before: Rates) -> None:
        self.forget()
        vars(rates).update(vars(before))
        empty_cache(self.model.device)

    def _add(
        self, parts: Sequence[TokenizedLists], units: Units, rates: Rates
    ) -> tuple[Tensor, Tensor]:
        self._most_tokens, self._scored = 0, []
        parts = [lists for lists in parts if len(lists)]
        added = [
            self._add_part(lists, units, rates, is_last=number == len(parts))
            for number, lists in enumerate(parts, start=1)
        ]
        if not added:
            return torch.zeros((), device=self.model.device), torch.zeros(
                (), device=self.model.device
            )
        loss, left = added[0]
        for more, more_left in added[1:]:
            loss, left = loss + more, left + more_left
        return loss, left

    def _add_part(
        self, lists: TokenizedLists, units: Units, rates: Rates, *, is_last: bool
    ) -> tuple[Tensor, Tensor]:
        config, objective, device = self.config, self.objective, self.model.device
        labels, offsets = (upload(array, device) for array in (lists.labels, lists.list_offsets))
        left = torch.zeros((), device=device)  # units under the cut

        def loss(scores: Tensor) -> Tensor:
            mean, counted = objective.mean(scores, labels, offsets, units)
            if counted is not None:
                left.copy_(counted)
            return mean

        def limit(scores: Tensor) -> Tensor | float:
            """Of |dL/dscore|, to which the caller gives its last factor: all units by those that
            the cut leaves.
            """
            if not objective.cut_by_rank or not config.skip_below:
                return config.skip_below
            uncut: Any = objective.num_units(lists.labels, lists.list_offsets)
            return config.skip_below * left / max(uncut, 1)

        if self._prepare is None:  # not before the first: the run then has its weights and adapters
            # Of several processes each sends a gradient when autograd has it whole.
            self._prepare = self.model.preparer(
                dtype=self.dtype,
                adds_gradients=not collectives.several(),
                graph_seed=self._graph_seed,
            )
        prepared = self._prepare(lists.pairs)
        lengths = prepared.tokens.lengths
        plan = plan_micro_batches(
            lengths,
            max_pairs=config.mini_batch_size,
            max_tokens=self.max_tokens,
            padded=prepared.padded,
        )
        # The first pair of a micro-batch is its longest.
        sizes = [
            len(part) * int(lengths[part[0]]) if prepared.padded else int(lengths[part].sum())
            for part in plan
        ]
        self._most_tokens = max([self._most_tokens, *sizes])
        cached = config.gradient_cache == "on"
        if config.gradient_cache == "auto":
            cached = self.memory < activation_bytes(
                self.model.model,
                sum(sizes),
                self.dtype,
                gradient_checkpointing=config.gradient_checkpointing,
            )
        options: dict[str, Any] = {"device": device, "skip_below": limit} if cached else {}
        if is_last:
            options["final"] = self.final
        push: Any = backward_cached if cached else backward_direct
        pushed = push(prepared, plan, loss, scale=self.scale, **options)
        self._scored.append((pushed.scores, offsets))
        rates.scored += len(lists.pairs)
        rates.skipped += pushed.num_skipped
        rates.tokens += int(lengths.sum())
        rates.padded_tokens += sum(sizes)
        return pushed.loss, left


def _graph_seed(config: TrainingConfig, device: torch.device) -> int | None:
    """Of the dropout inside CUDA graphs; None without them."""
    if not config.cuda_graphs:
        return None
    if not has_graphs(device):
        raise ValueError(f"cuda_graphs needs an NVIDIA GPU, got a model on {device}")
    if collectives.several():
        raise ValueError(
            "cuda_graphs must be off with several processes: gradients leave while backward runs"
        )
    return config.seed

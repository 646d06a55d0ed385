"""What every objective gives the training loop, which knows no loss: see `Objective`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor


class ObjectiveSum(NamedTuple):
    """An objective's sum over the units of some lists: preference pairs, documents or lists."""

    total: Tensor  # () with the scores' graph, fp32 at least; not divided by anything
    units: Tensor | None = (
        None  # () int64 on the scores' device, where ranks decide how many there are
    )


# What a sum is divided by; None where the sum itself is the loss, and of a combination each part's.
Units: TypeAlias = int | tuple[int | None, ...] | None


@dataclass(frozen=True)
class Objective:
    """A loss of scored lists; its fields are its options.

    The loss of a global batch is the sum over its units, divided by their number. A batch may be
    scored in parts and by several processes: each calls the objective on whole lists of its own,
    divides by the number of units of the global batch and goes back, so that the weights do not
    depend on how the batch was cut.

    A subclass is a frozen dataclass that names itself and defines `__call__` and `num_units`.
    """

    name: ClassVar[str]  # as the settings and the card say it
    citation: ClassVar[str] = ""  # BibTeX of the paper
    # Whether a document of another list may stand in a list with label 0; not where labels are a
    # teacher's scores, of which 0 is one like any other.
    zero_is_irrelevant: ClassVar[bool] = True
    # Lists that do not contribute, as messages say it.
    idle: ClassVar[str] = "without documents"

    def __call__(
        self,
        scores: Tensor,  # (N,)
        labels: Tensor,  # (N,)
        offsets: Tensor,  # (Q + 1,) int64
    ) -> ObjectiveSum:
        """The sum over the units of these lists; never waits for the device.

        Args:
            scores: (N,) raw scores of all documents, list after list, in any floating dtype.
            labels: (N,) fp32 labels, on the device of the scores.
            offsets: (Q + 1,) int64, there too; list q holds the documents offsets[q] to
                offsets[q + 1], and may hold none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def num_units(self, labels: np.ndarray, offsets: np.ndarray) -> Units:
        """What a batch's sum is divided by, on the host, from (N,) labels and (Q + 1,) offsets
        alone.

        Where a cut by rank decides, it is the number without the cut, and `__call__` gives the
        other.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define num_units")

    def mean(self, scores: Tensor, labels: Tensor, offsets: Tensor, units: Units) -> ObjectiveSum:
        """The sum over these lists' units, divided by the number of units of their global batch."""
        total, left = self(scores, labels, offsets)
        assert not isinstance(units, tuple)
        return ObjectiveSum(total if units is None else total / max(units, 1), left)

    @property
    def cut_by_rank(self) -> bool:
        """Whether ranks decide how many units there are: then `__call__` counts them."""
        return False

    @property
    def unit(self) -> str:
        """What `num_units` counts, in the plural, for who asks what there is to train on."""
        return ""

    @property
    def scores_idle(self) -> bool:
        """Whether such lists are scored all the same: where their loss is a constant other than
        0.
        """
        return False

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The losses that are added up: itself, or a combination's."""
        return (self,)

    def contributes(self, labels: np.ndarray) -> bool:
        """Whether a list with these (D,) labels can give a gradient at all; what can't is counted
        in the log.
        """
        return len(labels) > 0

    def check(self, labels: np.ndarray) -> None:
        """Raises ValueError, with what was expected and what came, where a list's (D,) labels do
        not fit.
        """

    def advice(self, labels: np.ndarray) -> str | None:
        """One sentence for the log where these (N,) labels can be trained on, but hardly should;
        else None.

        Asked once before training, of all labels that are known by then.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """The options by name as plain values, for the model's card and the run's state."""
        return asdict(self)

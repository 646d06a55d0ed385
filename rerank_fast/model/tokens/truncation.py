"""How many pairs were longer than a model's max_length: counted always, said once."""

from __future__ import annotations

import logging
import threading
from collections import Counter

logger = logging.getLogger(__name__)


class TruncationLog:
    """Truncated pairs of one model, from however many threads.

    Attributes:
        truncated: pairs that were truncated so far, by the max_length of the time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: set[int] = set()
        self.truncated: Counter[int] = Counter()

    def __reduce__(self) -> tuple[type[TruncationLog], tuple[()]]:
        return TruncationLog, ()  # a copy of the model has tokenised nothing yet

    def count(self, truncated: int, max_length: int) -> None:
        if truncated:
            with self._lock:
                self.truncated[max_length] += truncated

    def warn(self, truncated: int, total: int, max_length: int) -> None:
        """One warning for each max_length, of the first pairs that were truncated to it."""
        with self._lock:
            if not truncated or max_length in self._said:
                return
            self._said.add(max_length)
        logger.warning(
            "%d of %d pairs are longer than max_length=%d tokens and were truncated; this is said "
            "once, and the model's truncated_pairs counts on.",
            truncated,
            total,
            max_length,
        )

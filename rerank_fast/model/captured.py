"""What a CrossEncoder whose scores are replays of CUDA graphs keeps from call to call."""

from __future__ import annotations

import threading
from typing import Any

from rerank_fast.model.packed.hooks import must_be_called
from rerank_fast.model.preparation import Preparer


class CapturedScoring:
    """One Preparer with its graphs, for as long as the model's modules stay what they are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._preparer: Preparer | None = None
        self._made_of: Any = None

    def __reduce__(self) -> tuple[type[CapturedScoring], tuple[()]]:
        return CapturedScoring, ()  # a copy of the model captures its own weights

    def preparer(self, reranker: Any) -> Preparer:
        """A CrossEncoder's, that of the last call or a new one where a module or a hook has come or
        gone, or another dtype is computed in.
        """
        modules = list(reranker.model.modules())
        hooks = [must_be_called(one) for one in modules]
        made_of = modules, hooks, reranker.answers, reranker._dtype_of_steps
        with self._lock:
            if self._preparer is None or made_of != self._made_of:
                self._preparer, self._made_of = reranker.preparer(captures=True), made_of
            return self._preparer

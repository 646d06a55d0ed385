"""Items made in a thread while the caller works on those before: texts tokenised while others are
scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """The items in order, none of them None, up to `depth` made before they are asked for.

    One thread: a fast tokenizer has its own beside it, and needs the interpreter's lock for little.
    What making an item raises is raised in its place.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        futures = deque(thread.submit(next, iterator, None) for _ in range(depth))
        try:
            while (item := futures.popleft().result()) is not None:
                futures.append(thread.submit(next, iterator, None))
                yield item
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

"""Items are made in a thread, so many ahead and no more."""

import threading
import time

import pytest

from rerank_fast.model.tokens.ahead import ahead


def test_work_is_done_ahead_in_a_thread_and_its_errors_are_raised():
    made: list[str] = []

    def items():
        for i in range(6):
            made.append(threading.current_thread().name)
            yield i
        raise ValueError("row 6 is bad")

    iterator = ahead(items(), 3)
    assert next(iterator) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 4  # three beyond the one that was asked for
    assert all(name.startswith("ahead") for name in made)
    assert [next(iterator) for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="row 6 is bad"):
        next(iterator)
    before = set(threading.enumerate())
    another = ahead(iter(range(100)), 2)
    next(another)
    another.close()
    assert set(threading.enumerate()) <= before  # those of other libraries may end in between

"""One item ahead: in order, never further, and errors at their turn."""

from collections.abc import Iterator
from threading import Event

import pytest

from pipeline.parallel.prefetch import ahead


def test_the_next_item_is_made_while_the_caller_has_the_last() -> None:
    started = {number: Event() for number in range(4)}

    def items() -> Iterator[int]:
        for number, event in started.items():
            event.set()
            yield number

    seen = []
    for number in ahead(items()):
        assert all(started[before].wait(10) for before in range(min(number + 2, 4)))
        assert not any(started[after].is_set() for after in range(number + 2, 4))
        seen.append(number)
    assert seen == [0, 1, 2, 3]
    assert list(ahead([])) == []


def test_an_error_comes_at_its_turn() -> None:
    def items() -> Iterator[str]:
        yield "good"
        raise ValueError("bad")

    found = ahead(items())
    assert next(found) == "good"
    with pytest.raises(ValueError, match="bad"):
        next(found)


def test_a_caller_that_stops_early_leaves_no_thread_behind() -> None:
    found = ahead(iter(range(10**9)))
    assert next(found) == 0
    found.close()
    with pytest.raises(StopIteration):
        next(found)


def test_an_item_that_takes_too_long() -> None:
    never = Event()

    def items() -> Iterator[int]:
        yield 1
        never.wait()

    found = ahead(items(), seconds=0.1)
    assert next(found) == 1
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        next(found)
    never.set()

"""Prepare the next item while the last one is worked on."""

from collections.abc import Generator, Iterable
from queue import Empty, SimpleQueue
from threading import Semaphore, Thread
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], seconds: float | None = None) -> Generator[T, None, None]:
    """The items in their order; while the caller works on one, a thread computes the next.

    The thread is one item ahead at most. What `items` raises is raised here, at that item's turn. Raises TimeoutError
    if an item takes longer than `seconds` (None: any time); the thread is then left behind.
    """
    found: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    wanted, left = Semaphore(1), list[bool]()

    def compute() -> None:
        try:
            source = iter(items)
            while wanted.acquire() and not left:
                found.put(("item", next(source)))
        except StopIteration:
            found.put(("end", None))
        except BaseException as error:
            found.put(("error", error))

    thread = Thread(target=compute, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = found.get(timeout=seconds)
            except Empty:
                raise TimeoutError(f"nothing came for {seconds:g} s") from None
            if kind == "error":
                raise value
            if kind == "end":
                return
            wanted.release()
            yield value
    finally:
        left.append(True)
        wanted.release()
        if seconds is None:
            thread.join()

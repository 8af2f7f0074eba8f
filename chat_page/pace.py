"""How often the page is written anew while a reply comes in."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def batches(
    items: Iterable[Item],
    interval: Callable[[], float],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Item]]:
    """The first item at once; then what has come, at most once in `interval()` seconds.

    Joined, the batches are the items, and what `items` raises comes after them. A thread of its own
    reads the items, so that one is never held back until the next has come.
    """
    arrived: SimpleQueue[Item | _End] = SimpleQueue()

    def read() -> None:
        failure: Exception | None = None
        try:
            for item in items:
                arrived.put(item)
        except Exception as error:
            failure = error
        arrived.put(_End(failure))

    threading.Thread(target=read, name="reply", daemon=True).start()
    due = clock()
    end = None
    while end is None:
        batch, got = [], arrived.get()
        while True:
            if isinstance(got, _End):
                end = got
                break
            batch.append(got)
            try:
                got = arrived.get(timeout=max(0.0, due - clock()))
            except Empty:
                break
        if batch:
            due = clock() + interval()
            yield batch
    if end.failure is not None:
        raise end.failure


class _End:
    """That nothing more comes, and why, if it is a failure."""

    def __init__(self, failure: Exception | None):
        self.failure = failure

"""How often the page is written anew while a reply comes in."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Batches(Generic[Item]):
    """The first item at once; then what has come, at most once in `interval()` seconds.

    Joined, the batches are the items, and what `items` raises comes after them. A thread of its own
    reads the items, so that one is never held back until the next has come.
    """

    def __init__(
        self,
        items: Generator[Item, None, None],
        interval: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._items = items
        self._interval = interval
        self._clock = clock
        self._arrived: SimpleQueue[Item | _End] = SimpleQueue()
        self._is_ended = False

    def end(self) -> None:
        """Wait for nothing more: what has come is the last. From any thread, more than once."""
        self._is_ended = True
        self._arrived.put(_End(None))

    def __iter__(self) -> Iterator[list[Item]]:
        threading.Thread(target=self._read, name="reply", daemon=True).start()
        due = self._clock()
        end = None
        while end is None:
            batch, got = [], self._arrived.get()
            while True:
                if isinstance(got, _End):
                    end = got
                    break
                batch.append(got)
                try:
                    got = self._arrived.get(timeout=max(0.0, due - self._clock()))
                except Empty:
                    break
            if batch:
                due = self._clock() + self._interval()
                yield batch
        if end.failure is not None:
            raise end.failure

    def _read(self) -> None:
        failure: Exception | None = None
        try:
            with closing(self._items) as items:
                for item in items:
                    self._arrived.put(item)
                    if self._is_ended:
                        break
        except Exception as error:
            failure = error
        self._arrived.put(_End(failure))


class _End:
    """That nothing more comes, and why, if it is a failure."""

    def __init__(self, failure: Exception | None):
        self.failure = failure

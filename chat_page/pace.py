"""Limits how often the page is updated while a reply arrives."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Batches(Generic[Item]):
    """Yields the first item at once, then batches of items, at most one per `interval()` seconds.

    The batches keep all items in order; an exception from `items` follows them. A separate thread
    reads the items, so that a batch never waits for a further item.
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
        """End after the items that have arrived. Any thread may call this, also repeatedly."""
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
    """Marks the end of the items, with the exception if they failed."""

    def __init__(self, failure: Exception | None):
        self.failure = failure

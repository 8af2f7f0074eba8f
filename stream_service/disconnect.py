"""Notices clients that have disconnected."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.05  # between two checks of all clients


class DisconnectWatcher:
    """Calls a function once when a client has disconnected.

    A WSGI server notices a disconnect only when it writes, and a waiting stream writes nothing.
    waitress can be asked instead. One thread asks for all clients, because one thread per client
    would slow the computing thread down. While no client is watched, the thread sleeps.
    """

    def __init__(self, interval: float = INTERVAL_SECONDS):
        self._interval = interval
        self._changed = threading.Condition()
        self._watched: dict[object, tuple[Callable[[], bool], Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, gone: Callable[[], bool], then: Callable[[], None]) -> Callable[[], None]:
        """Call `then` once when `gone` returns True. Returns a function that stops watching."""
        key = object()
        with self._changed:
            self._watched[key] = (gone, then)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="disconnects", daemon=True)
                self._thread.start()
            self._changed.notify()

        def unwatch() -> None:
            with self._changed:
                self._watched.pop(key, None)

        return unwatch

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched)
                watched = list(self._watched.items())
            for key, (gone, then) in watched:
                if _left(gone):
                    with self._changed:
                        self._watched.pop(key, None)
                    then()
            threading.Event().wait(self._interval)


def _left(gone: Callable[[], bool]) -> bool:
    """Call `gone`. An exception counts as a disconnect: the thread must watch the other clients."""
    try:
        return gone()
    except Exception:
        logger.exception("cannot tell whether a client is still connected; aborting its request")
        return True

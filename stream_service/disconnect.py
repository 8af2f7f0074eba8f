"""Who has left? One thread asks for all the open streams."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 0.05


class DisconnectWatcher:
    """Calls back, once, when a client has gone away.

    A WSGI server learns of a disconnect only when it writes, and a waiting stream writes nothing;
    waitress answers when asked. One thread asks for all: as many threads as streams, each polling,
    would take the interpreter from the thread that computes. It sleeps while there is nobody.
    """

    def __init__(self, interval: float = INTERVAL_SECONDS):
        self._interval = interval
        self._changed = threading.Condition()
        self._watched: dict[object, tuple[Callable[[], bool], Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, gone: Callable[[], bool], then: Callable[[], None]) -> Callable[[], None]:
        """Call `then` as soon as `gone` answers True; returns a function that stops watching."""
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
    """A connection that cannot be asked is taken for gone: the others must still be watched."""
    try:
        return gone()
    except Exception:
        logger.exception("could not ask whether a client is still there")
        return True

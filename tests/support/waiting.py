"""Wait for events, never for a fixed time."""

import threading
import time
from collections.abc import Callable

from stream_generator.engine.engine import Engine

TIMEOUT = 120  # seconds until a test that hangs fails


def wait_for(
    what: threading.Event | threading.Semaphore | threading.Thread | Callable[[], object],
    engine: Engine | None = None,
) -> None:
    """Wait for an event, a semaphore, the end of a thread, or a condition; fail after `TIMEOUT`.

    engine: tells when the condition may have changed. Without an engine, the condition is polled
    without a pause, so it must take some time itself, as an HTTP request does.
    """
    if isinstance(what, threading.Event):
        held = what.wait(TIMEOUT)
    elif isinstance(what, threading.Semaphore):
        held = what.acquire(timeout=TIMEOUT)
    elif isinstance(what, threading.Thread):
        what.join(TIMEOUT)
        held = not what.is_alive()
    elif engine is not None:
        held = engine.wait_for(what, TIMEOUT)
    else:
        end = time.monotonic() + TIMEOUT
        while not (held := bool(what())) and time.monotonic() < end:
            pass
    assert held, f"the test waited {TIMEOUT} seconds for {what}"

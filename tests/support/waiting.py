"""How tests wait: for an event, never for a time."""

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

    engine: reports the changes that a condition depends on. Without one, the condition is asked
    again and again, so it must take time itself, as a request to the service does.
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

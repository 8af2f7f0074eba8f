"""The state of an engine: open, draining, closed or failed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, auto

# A step hangs after this many seconds, or ten times the longest step so far if that is more.
STUCK_SECONDS = 60.0


class EngineState(IntEnum):
    """What an engine does with requests. A state changes only to a later one."""

    OPEN = auto()  # requests are accepted and computed
    DRAINING = auto()  # accepted requests are computed, new ones are rejected
    CLOSED = auto()  # all requests are rejected
    FAILED = auto()  # all requests are rejected, because the engine has failed


class Lifecycle:
    """The state of an engine, and the duration of the current step.

    Any thread may read all properties. The engine changes the state under its lock. Only the
    computing thread writes the duration.
    """

    def __init__(self) -> None:
        self.state = EngineState.OPEN
        self._drained_by: float | None = None  # deadline of the last requests
        self._step_began: float | None = None
        self._longest_step = 0.0  # seconds

    def move(self, state: EngineState) -> None:
        """Change the state, unless it is already a later one."""
        self.state = max(self.state, state)

    def drain(self, seconds: float) -> None:
        """Stop accepting requests, and close after `seconds`."""
        self._drained_by = time.monotonic() + seconds
        self.move(EngineState.DRAINING)

    @property
    def is_closed(self) -> bool:
        """Whether the engine has stopped computing."""
        return self.state >= EngineState.CLOSED

    def is_over(self, *, idle: bool) -> bool:
        """Whether the engine is closed or has drained. idle: whether no request is left."""
        limit = self._drained_by
        is_drained = limit is not None and (idle or time.monotonic() >= limit)
        return self.is_closed or is_drained

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step, so that `is_healthy` notices a step that hangs."""
        self._step_began = began = time.monotonic()
        yield
        self._step_began = None
        self._longest_step = max(self._longest_step, time.monotonic() - began)

    @property
    def has_failed(self) -> bool:
        """Whether the engine itself, and not only a request, has failed."""
        return self.state is EngineState.FAILED

    @property
    def is_accepting(self) -> bool:
        """Whether the engine accepts requests now."""
        return self.is_healthy and self.state is EngineState.OPEN

    @property
    def is_healthy(self) -> bool:
        """Whether the engine computes or waits for work. A draining engine is healthy too."""
        began = self._step_began
        limit = max(STUCK_SECONDS, 10 * self._longest_step)
        stuck = began is not None and time.monotonic() - began > limit
        return not (self.is_closed or stuck)

"""Requests on their way: counted before any work, found by their id, aborted when nobody reads."""

import math
import threading
from collections.abc import Callable, Iterable

from stream_generator.engine.engine import Engine
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import DuplicateRequest, EngineClosed, QueueFull
from stream_generator.sampling_params import SamplingParams
from stream_service.disconnect import DisconnectWatcher

MOST_RETRY_SECONDS = 60
SMOOTHING = 0.2  # weight of the newest request's time


class Admission:
    """One request's place, from before any work is done for it until its answer is closed."""

    def __init__(self, dispatcher: "Dispatcher", request_id: str, gone: Callable[[], bool] | None):
        self.id = request_id
        self.streams: list[TokenStream] = []
        self.n = 1  # streams for each prompt
        self._dispatcher = dispatcher
        self._gone = gone
        self._unwatch: Callable[[], None] | None = None
        self._aborted = False

    def submit(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams, n: int = 1
    ) -> list[TokenStream]:
        """`Engine.submit_several`, aborted when the client goes away, or by `abort`."""
        self.n = n
        self.streams = self._dispatcher.engine.submit_several(prompts, params, n, self.id)
        if self._gone is not None:
            self._unwatch = self._dispatcher.watcher.watch(self._gone, self.abort)
        if self._aborted:  # in between
            self.abort()
        return self.streams

    def abort(self) -> None:
        """Abort what is computed for it. From any thread."""
        self._aborted = True
        for stream in self.streams:
            stream.close()

    def release(self) -> None:
        """The answer is closed, complete or not. More than once is fine."""
        if self._unwatch is not None:
            self._unwatch()
        self.abort()
        self._dispatcher.forget(self)


class Dispatcher:
    """All the requests that the service has taken in."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.watcher = DisconnectWatcher()
        self.limit = engine.intake.requests
        self._lock = threading.Lock()
        self._admitted: dict[str, Admission] = {}
        self._seconds: float | None = None  # that a request runs, lately

    def admit(self, request_id: str, gone: Callable[[], bool] | None) -> Admission:
        """A place for a request, before its body is looked at.

        gone: tells whether its client has left. Raises `QueueFull`, `EngineClosed` or
        `DuplicateRequest`.
        """
        if not self.engine.life.is_accepting:
            raise EngineClosed("the service takes no requests at the moment; try again later")
        with self._lock:
            if request_id in self._admitted:
                raise DuplicateRequest(f"a request with the id {request_id} is still running")
            if len(self._admitted) >= self.limit:
                raise QueueFull(f"{self.limit} requests are open already; try again in a while")
            admission = self._admitted[request_id] = Admission(self, request_id, gone)
        return admission

    def abort(self, request_id: str) -> Admission | None:
        """Abort a request, and return it once its streams have finished, or a minute has passed.

        None: there is no such request.
        """
        with self._lock:
            admission = self._admitted.get(request_id)
        if admission is not None:
            admission.abort()
            requests = [stream.request for stream in admission.streams]
            self.engine.wait_for(lambda: all(request.finish_reason for request in requests))
        return admission

    def forget(self, admission: Admission) -> None:
        with self._lock:
            if self._admitted.get(admission.id) is not admission:
                return
            del self._admitted[admission.id]
            for reply in (stream.request for stream in admission.streams):
                if reply.started_at is not None and reply.finished_at is not None:
                    seconds = reply.finished_at - reply.started_at
                    old = seconds if self._seconds is None else self._seconds
                    self._seconds = old + SMOOTHING * (seconds - old)

    def retry_after(self) -> int:
        """Seconds until a place is likely to be free: requests' time, over how many run at once."""
        seconds = (self._seconds or 1.0) / max(self.engine.running, 1)
        return min(max(math.ceil(seconds), 1), MOST_RETRY_SECONDS)

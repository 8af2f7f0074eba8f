"""Counts open requests, finds them by id, and aborts them."""

import math
import threading
from collections.abc import Callable, Iterable

from stream_generator.engine.engine import Engine
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import DuplicateRequest, EngineClosed, QueueFull
from stream_generator.sampling_params import SamplingParams
from stream_service.disconnect import DisconnectWatcher

MAX_RETRY_SECONDS = 60
SMOOTHING = 0.2  # weight of the newest request's time


class Admission:
    """An open request, from before its body is read until its answer is closed."""

    def __init__(self, dispatcher: "Dispatcher", request_id: str, gone: Callable[[], bool] | None):
        self.id = request_id
        self.streams: list[TokenStream] = []
        self.n = 1  # replies to each prompt
        self._dispatcher = dispatcher
        self._gone = gone
        self._unwatch: Callable[[], None] | None = None
        self._aborted = False

    def submit(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams, n: int = 1
    ) -> list[TokenStream]:
        """Call `Engine.submit_several`, and abort the streams if the client disconnects."""
        self.n = n
        self.streams = self._dispatcher.engine.submit_several(prompts, params, n, self.id)
        if self._gone is not None:
            self._unwatch = self._dispatcher.watcher.watch(self._gone, self.abort)
        if self._aborted:  # before there were streams
            self.abort()
        return self.streams

    def abort(self) -> None:
        """Abort all streams of the request. Any thread may call this."""
        self._aborted = True
        for stream in self.streams:
            stream.close()

    def release(self) -> None:
        """Forget the request, and abort its unfinished streams. Further calls do nothing."""
        if self._unwatch is not None:
            self._unwatch()
        self.abort()
        self._dispatcher.forget(self)


class Dispatcher:
    """The open requests of the service."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.watcher = DisconnectWatcher()
        self.limit = engine.intake.requests
        self._lock = threading.Lock()
        self._admitted: dict[str, Admission] = {}
        self._seconds: float | None = None  # smoothed time of a reply

    def admit(self, request_id: str, gone: Callable[[], bool] | None) -> Admission:
        """Open a request before its body is read.

        gone: tells whether the client has disconnected; None if the server cannot know.
        Raises `QueueFull`, `EngineClosed` or `DuplicateRequest`.
        """
        if not self.engine.life.is_accepting:
            raise EngineClosed("the service accepts no requests now; try again later")
        with self._lock:
            if request_id in self._admitted:
                raise DuplicateRequest(f"a request with the id {request_id} is still running")
            if len(self._admitted) >= self.limit:
                raise QueueFull(f"{self.limit} requests are open, the maximum; try again later")
            admission = self._admitted[request_id] = Admission(self, request_id, gone)
        return admission

    def abort(self, request_id: str) -> Admission | None:
        """Abort a request, and wait up to a minute until all its streams have finished.

        Returns None if no open request has this id.
        """
        with self._lock:
            admission = self._admitted.get(request_id)
        if admission is not None:
            admission.abort()
            requests = [stream.request for stream in admission.streams]
            self.engine.wait_for(lambda: all(request.finish_reason for request in requests))
        return admission

    def forget(self, admission: Admission) -> None:
        """Remove an open request, and record how long its replies took."""
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
        """Estimate the seconds until a slot is free: time per reply / number of running replies."""
        seconds = (self._seconds or 1.0) / max(self.engine.running, 1)
        return min(max(math.ceil(seconds), 1), MAX_RETRY_SECONDS)

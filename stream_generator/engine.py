"""The one thread that computes, and the streams it fills.

For now it runs one sequence at a time; the others wait in order. `submit -> TokenStream` is the
seam behind which that can change.
"""

import gc
import logging
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Self

import torch

from stream_generator.checkpoint import Checkpoint
from stream_generator.errors import (
    DuplicateRequest,
    EngineClosed,
    GenerationFailed,
    QueueFull,
)
from stream_generator.generate import stream_sequence
from stream_generator.sampling_params import SamplingParams
from stream_generator.sequence import QueuePosition, Sequence, TokenOutput
from stream_generator.token_stream import TokenStream

logger = logging.getLogger(__name__)


class Engine:
    """Serves requests from one model on one computing thread.

    Every method but `step` may be called from any thread. `start` runs `step` on a thread of its
    own until `close`; a test may call `step` itself instead.
    """

    def __init__(self, checkpoint: Checkpoint, *, max_waiting: int = 32):
        self.checkpoint = checkpoint
        self.max_waiting = max_waiting
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[TokenStream] = deque()
        self._streams: dict[str, TokenStream] = {}  # waiting and running, by request id
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        # Of the computing thread alone:
        self._running: TokenStream | None = None
        self._outputs: Iterator[TokenOutput] = iter(())

    def submit(
        self, prompt_ids: Iterable[int], params: SamplingParams, request_id: str | None = None
    ) -> TokenStream:
        """Take a request in, or raise at once, before anything is sent to anybody.

        Raises `PromptTooLong` or `InvalidRequest` for what can't be served, `QueueFull`,
        `EngineClosed` or `DuplicateRequest` for what can't be served now.
        """
        sequence = self.checkpoint.new_sequence(
            prompt_ids, params, request_id=request_id or uuid.uuid4().hex
        )
        stream = TokenStream(sequence, self.abort)
        with self._changed:
            if self._closing:
                raise EngineClosed("the service is shutting down; send the request again later")
            if sequence.id in self._streams:
                raise DuplicateRequest(f"a request with the id {sequence.id} is still running")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting already; try again in a while"
                )
            self._streams[sequence.id] = stream
            self._waiting.append(stream)
            position = len(self._streams) - 1
            if position:
                stream.put(QueuePosition(position))
            self._changed.notify()
        return stream

    def abort(self, sequence: Sequence) -> None:
        """End a request whose reader has left: before its next token, or at once if it waits."""
        with self._changed:
            sequence.abort_requested = True
            self._changed.notify()

    def clear(self) -> None:
        """Give cached device memory back, between two steps; returns when it is done."""
        self._on_computing_thread(_empty_device_cache)

    def step(self) -> bool:
        """Compute one token of the running sequence; False when there was nothing to do."""
        self._drop_aborted()
        stream = self._running or self._admit()
        if stream is None:
            return False
        output = self._compute(stream)
        self._deliver(stream, output)
        return True

    def start(self) -> Self:
        """Begin to serve, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    @property
    def healthy(self) -> bool:
        """Whether requests that are submitted now will be served."""
        return not self._closing and self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Take nothing new, stop the thread after its step, and fail what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._fail_all("the service is shutting down; send the request again later")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._run_errands()
                self.step()
        except BaseException:
            logger.exception("the engine thread failed; restart the service")
            self._fail_all("the engine failed; the service must be restarted")

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when the engine is to close."""
        with self._changed:
            self._changed.wait_for(lambda: self._streams or self._errands or self._closing)
            return not self._closing

    def _drop_aborted(self) -> None:
        """Release every sequence that nobody reads any more."""
        with self._changed:
            aborted = [s for s in self._streams.values() if s.sequence.abort_requested]
        for stream in aborted:
            self._deliver(stream, stream.sequence.abort())

    def _admit(self) -> TokenStream | None:
        """Start the sequence that has waited longest."""
        with self._changed:
            if not self._waiting:
                return None
            stream = self._running = self._waiting.popleft()
            for position, waiting in enumerate(self._waiting, start=1):
                waiting.put(QueuePosition(position))
        stream.sequence.start()
        self._outputs = stream_sequence(self.checkpoint.model, stream.sequence)
        return stream

    def _compute(self, stream: TokenStream) -> TokenOutput:
        """One more token of the running sequence; a failure is that sequence's own."""
        try:
            return next(self._outputs)
        except Exception as error:
            logger.exception("request %s failed", stream.id)
            return stream.sequence.fail(_reason(error))

    def _deliver(self, stream: TokenStream, output: TokenOutput) -> None:
        """Hand an output to its reader; a finished sequence leaves the engine first."""
        if output.finish_reason is not None:
            if stream is self._running:
                self._running, self._outputs = None, iter(())
            with self._changed:
                del self._streams[stream.id]
                if stream in self._waiting:
                    self._waiting.remove(stream)
        stream.put(output)

    def _on_computing_thread(self, errand: Callable[[], None]) -> None:
        done: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise EngineClosed("the service is shutting down")
            self._errands.append((errand, done))
            self._changed.notify()
        done.result()

    def _run_errands(self) -> None:
        while self._errands:
            errand, done = self._errands.popleft()
            try:
                errand()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _fail_all(self, reason: str) -> None:
        """The end: nothing new comes in, and whoever still waits is told why."""
        with self._changed:
            self._closing = True
            streams = list(self._streams.values())
        for stream in streams:
            self._deliver(stream, stream.sequence.fail(reason))
        while self._errands:
            self._errands.popleft()[1].set_exception(EngineClosed(reason))


def _reason(error: Exception) -> str:
    """What the reader is told. Details stay in the log: they may hold paths or addresses."""
    if isinstance(error, GenerationFailed):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory; shorten the prompt or lower max_new_tokens"
    return f"generation failed ({type(error).__name__}); the service's log has the details"


def _empty_device_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

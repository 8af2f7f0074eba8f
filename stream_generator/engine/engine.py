"""The engine: the methods that other threads call, and the loop of the computing thread."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Self

from stream_generator.engine.batch import Batch
from stream_generator.engine.intake import Intake
from stream_generator.engine.lifecycle import EngineState, Lifecycle
from stream_generator.engine.runner import Runner
from stream_generator.engine.runners import reject_if_not_reproducible, runner_of
from stream_generator.engine.scheduler import Pace
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import (
    DuplicateRequest,
    EngineClosed,
    GenerationFailed,
    StreamGeneratorError,
    TimeLimitReached,
)
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import (
    FinishReason,
    QueuePosition,
    Request,
    TokenOutput,
)
from stream_generator.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 60.0  # how long callers wait for the computing thread
SHUTTING_DOWN = "the service is shutting down; send the request again later"


class Engine:
    """Serves many requests at once from one model, on one computing thread.

    Any thread may call any method except `run` and `step`. `run` computes on the calling thread
    until `close`. `start` calls `run` on a new thread. Prefer `run` on the thread that loaded the
    model: a second thread gets a second OpenMP team. Idle threads then sleep instead of waiting
    actively, which costs nearly a third of the speed on 2 cores (`docs/performance.md`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_waiting: int = 32,
        max_seconds: float | None = None,
        runner: Runner | None = None,
        reproducible: bool = False,
        pace: Pace | None = None,
    ):
        """max_waiting: limit of requests in the queue. `Intake` also limits their tokens.
        max_seconds: time limit of each request, counted from `submit`.
        runner: by default, the runner that fits the model and the free memory.
        reproducible: reuse only keys and values of prompts, so that a reply does not depend on
        earlier replies. Raises `CheckpointError` if it could depend on concurrent requests.
        pace: limits the prompt tokens that share a step with replies; by default, a new `Pace`.
        """
        self._runner = runner or runner_of(checkpoint)
        if reproducible:
            reject_if_not_reproducible(self._runner)
        self.checkpoint = replace(checkpoint, context_length=self._runner.context_length)
        self.intake = Intake(
            self.checkpoint, self._runner.slots, max_waiting, self._runner.has_logprobs, max_seconds
        )
        self.reproducible = self._runner.reproducible  # see `Runner.reproducible`
        self.life = Lifecycle()
        # `_changed` guards the fields below. `Batch` and `Lifecycle` document the exceptions.
        self._changed = threading.Condition()
        self._streams: dict[str, TokenStream] = {}  # of waiting and running requests, by request id
        self._clears: list[Future[None]] = []  # pending calls of `clear`
        self._batch = Batch(self._runner, prompts_only=reproducible, pace=pace)
        self._thread: threading.Thread | None = None

    def submit(
        self, prompt_ids: Iterable[int], params: SamplingParams, request_id: str | None = None
    ) -> TokenStream:
        """Queue a request.

        Raises `PromptTooLong` or `InvalidRequest` if the request can never be served, and
        `QueueFull`, `EngineClosed` or `DuplicateRequest` if it cannot be served now.
        """
        return self.submit_several([prompt_ids], params, 1, request_id)[0]

    def submit_several(
        self,
        prompts: Iterable[Iterable[int]],
        params: SamplingParams,
        n: int,
        request_id: str | None = None,
    ) -> list[TokenStream]:
        """Queue `n` replies to each prompt, either all or none. Each prompt is computed once.

        If `params` has a seed, reply i of a prompt uses seed + i. Returns the streams in the order
        of the prompts. The first has `request_id`; the others add "#1", "#2"... Raises as `submit`.
        """
        requests = self.intake.new_requests(prompts, params, n, request_id or uuid.uuid4().hex)
        streams = [TokenStream(request, self.abort) for request in requests]
        with self._changed:
            if self.life.state is not EngineState.OPEN:
                raise EngineClosed(SHUTTING_DOWN)
            for stream in streams:
                if stream.id in self._streams:
                    raise DuplicateRequest(f"a request with the id {stream.id} is still running")
            self.intake.reject_if_full(requests, self._batch.waiting, self._batch.free_slots)
            for stream in streams:
                self._streams[stream.id] = stream
                self._batch.add(stream.request)
                if (position := len(self._batch.waiting) - self._batch.free_slots) > 0:
                    stream.put(QueuePosition(position))
            self._changed.notify_all()
        return streams

    def abort(self, request: Request) -> None:
        """Abort a request at the end of the step in progress."""
        with self._changed:
            request.abort_requested = True
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], object], timeout: float = MAX_WAIT_SECONDS) -> bool:
        """Wait until `condition()` is true; return False after `timeout` seconds.

        The engine calls `condition` whenever a request is queued, aborted or finished, and after
        `clear`, `drain` and `close`. `condition` runs under the engine's lock and must be quick.
        """
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout))

    def clear(self) -> None:
        """Forget computed prefixes, and return cached device memory to the system.

        Raises `EngineClosed` if it closes or is busy for a minute, `GenerationFailed` if it fails.
        """
        done: Future[None] = Future()
        with self._changed:
            if self.life.is_closed:
                raise EngineClosed(SHUTTING_DOWN)
            self._clears.append(done)
            self._changed.notify_all()
        try:
            done.result(timeout=MAX_WAIT_SECONDS)
        except TimeoutError:
            raise EngineClosed("the engine is too busy; try again later") from None

    def step(self) -> bool:
        """Compute one token for every request in decode, and chunks of some prompts.

        Delivers each output immediately. Returns False if no request was running.
        """
        self._drop()
        self._admit()
        has_work = self.running > 0
        for request, output in self._batch.step():
            self._deliver(request, output)
        return has_work

    def run(self) -> None:
        """Serve until the engine is closed, drained or failed. Then fail all remaining requests."""
        reason: StreamGeneratorError = EngineClosed(SHUTTING_DOWN)
        try:
            while self._wait_for_work():
                self._serve_clears()
                with self.life.step():
                    self.step()
        except BaseException:
            logger.exception("the engine failed; restart the service")
            reason = GenerationFailed("the engine failed; the service must be restarted")
            self._move_to(EngineState.FAILED)
        finally:
            self._fail_all(reason)

    def start(self) -> Self:
        """Call `run` on a new thread."""
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()
        return self

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return self._batch.running

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._batch.waiting)

    @property
    def requests(self) -> list[Request]:
        """The waiting and running requests, in the order of their arrival."""
        with self._changed:
            return [stream.request for stream in self._streams.values()]

    @property
    def pending_clears(self) -> int:
        """How many calls of `clear` are still waiting."""
        return len(self._clears)

    def drain(self, seconds: float) -> None:
        """Stop accepting requests. `run` returns when all requests have finished, or after
        `seconds`. A signal handler may call this method."""
        with self._changed:
            self.life.drain(seconds)
            self._changed.notify_all()

    def close(self, reason: str = SHUTTING_DOWN) -> None:
        """Stop accepting requests, end the thread of `start`, and fail the remaining requests."""
        self._move_to(EngineState.CLOSED)
        if self._thread is not None:
            self._thread.join()
        self._fail_all(EngineClosed(reason))

    def _move_to(self, state: EngineState) -> None:
        with self._changed:
            self.life.move(state)
            self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait for work. Return False if `run` must return."""
        with self._changed:
            while not (self._streams or self._clears or self.life.is_over(idle=not self._streams)):
                # The timeout is needed because a signal handler on this thread may change the
                # state just before the wait begins. The wait then misses the notification.
                self._changed.wait(timeout=1.0)
            return not self.life.is_over(idle=not self._streams)

    def _drop(self) -> None:
        """Finish requests that were aborted, or that got no token within their time limit."""
        for request in self.requests:
            if request.abort_requested:
                self._deliver(request, request.abort())
            elif request.is_late and request.first_token_at is None:
                late = TimeLimitReached("no token came within the time limit; try again later")
                self._deliver(request, request.fail(late))

    def _admit(self) -> None:
        """Start waiting requests in free slots. Send new positions to requests that still wait."""
        with self._changed:
            if not self._batch.admit():
                return
            for position, request in enumerate(self._batch.waiting, start=1):
                self._streams[request.id].put(QueuePosition(position))

    def _deliver(self, request: Request, output: TokenOutput) -> None:
        """Put an output into the queue of its stream. Release the slot of a finished request."""
        stream = self._streams[request.id]
        if output.finish_reason is not None:
            sound = output.finish_reason is not FinishReason.ERROR
            self._forget(request, keep=sound)
            self._batch.release(request, sound=sound)
        stream.put(output)

    def _forget(self, request: Request, *, keep: bool) -> None:
        """Forget a finished request. keep: later prompts may reuse its keys and values."""
        with self._changed:
            del self._streams[request.id]
            self._batch.remove(request, keep=keep)
            self._changed.notify_all()

    def _serve_clears(self) -> None:
        """Serve the pending calls of `clear`. After a failure they are left for `_fail_all`."""
        with self._changed:
            clears = list(self._clears)
        if clears:
            self._batch.clear()
        with self._changed:
            del self._clears[: len(clears)]
        for done in clears:
            done.set_result(None)

    def _fail_all(self, reason: StreamGeneratorError) -> None:
        """Close, and fail all requests and calls of `clear`. The device may be lost: leave it."""
        with self._changed:
            self._move_to(EngineState.CLOSED)
            streams, clears, self._clears = list(self._streams.values()), self._clears, []
        for stream in streams:
            output = stream.request.fail(reason)
            self._forget(stream.request, keep=False)
            stream.put(output)
        for done in clears:
            done.set_exception(reason)

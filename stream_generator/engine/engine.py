"""The one thread that computes, and the streams it fills."""

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Self

from stream_generator.engine.batch import Batch
from stream_generator.engine.intake import Intake
from stream_generator.engine.lifecycle import EngineState, Lifecycle
from stream_generator.engine.runner import Runner
from stream_generator.engine.runners import refuse_if_not_reproducible, runner_of
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
    RequestStatus,
    TokenOutput,
)
from stream_generator.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0  # of those who wait for the computing thread
SHUTTING_DOWN = "the service is shutting down; send the request again later"


class Engine:
    """Serves many requests at once from one model, on one computing thread.

    Every method but `run` and `step` may be called from any thread. `run` computes on the thread
    that calls it, until `close`; `start` gives it one of its own; a test may call `step` itself.
    Best is the thread that has loaded the model: each further thread that computes gets an OpenMP
    team, and GNU's then stops spinning: on 2 cores nearly a third slower (`docs/performance.md`).
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
        """max_waiting: requests in the queue; `Intake` bounds their tokens too.
        max_seconds: for each request, from `submit` on.
        runner: by default the one that fits the model, as large as the memory allows.
        reproducible: reuse only positions that a prompt has computed, so that a reply does not
        depend on earlier ones. Raises `CheckpointError` if the runner's replies depend on others
        that run beside them.
        pace: sets how many prompt tokens share a step with running replies. By default, the time
        of recent steps sets this.
        """
        self._runner = runner or runner_of(checkpoint)
        if reproducible:
            refuse_if_not_reproducible(self._runner)
        self.checkpoint = replace(checkpoint, context_length=self._runner.context_length)
        self.intake = Intake(
            self.checkpoint, self._runner.slots, max_waiting, self._runner.has_logprobs, max_seconds
        )
        self.reproducible = self._runner.reproducible  # a reply's bits depend on no other request
        self.life = Lifecycle()
        # `_changed` guards what follows, as far as `Batch` and `Lifecycle` do not say otherwise.
        self._changed = threading.Condition()
        self._streams: dict[str, TokenStream] = {}  # waiting and running, by request id
        self._clears: list[Future[None]] = []  # those who wait for `clear`
        self._batch = Batch(self._runner, prompts_only=reproducible, pace=pace)
        self._thread: threading.Thread | None = None

    def submit(
        self, prompt_ids: Iterable[int], params: SamplingParams, request_id: str | None = None
    ) -> TokenStream:
        """Take a request in, or raise at once, before anything is sent to anybody.

        Raises `PromptTooLong` or `InvalidRequest` for what can't be served, `QueueFull`,
        `EngineClosed` or `DuplicateRequest` for what can't be served now.
        """
        return self.submit_several([prompt_ids], params, 1, request_id)[0]

    def submit_several(
        self,
        prompts: Iterable[Iterable[int]],
        params: SamplingParams,
        n: int,
        request_id: str | None = None,
    ) -> list[TokenStream]:
        """Ask for `n` replies to each prompt, which is computed once; all are taken in, or none.

        Where `params` name a seed, a prompt's reply i has the seed plus i. Streams come prompt by
        prompt; the ids of those after the first end in "#1", "#2" and so on. Raises as `submit`
        does.
        """
        first_id = request_id or uuid.uuid4().hex
        streams: list[TokenStream] = []
        for prompt, own in _each(prompts, params, n):
            name = f"{first_id}#{len(streams)}" if streams else first_id
            request = self.intake.new_request(prompt, own, request_id=name)
            streams.append(TokenStream(request, self.abort))
        asked = [stream.request for stream in streams]
        self.intake.refuse_too_many(asked)
        with self._changed:
            if self.life.state is not EngineState.OPEN:
                raise EngineClosed(SHUTTING_DOWN)
            for stream in streams:
                if stream.id in self._streams:
                    raise DuplicateRequest(f"a request with the id {stream.id} is still running")
            self.intake.refuse_if_full(asked, self._batch.waiting, self._batch.free_slots)
            for stream in streams:
                self._streams[stream.id] = stream
                self._batch.add(stream.request)
                if (position := len(self._batch.waiting) - self._batch.free_slots) > 0:
                    stream.put(QueuePosition(position))
            self._changed.notify_all()
        return streams

    def abort(self, request: Request) -> None:
        """End a request whose reader has left, when the step in progress ends."""
        with self._changed:
            request.abort_requested = True
            self._changed.notify_all()

    def wait_until_finished(self, request: Request) -> bool:
        """Return when a request that was submitted has its finish reason; False: not in time."""
        finished = RequestStatus.FINISHED
        return self.wait_for(lambda: request.status is finished, PATIENCE_SECONDS)

    def wait_for(self, condition: Callable[[], object], timeout: float | None = None) -> bool:
        """Return True when `condition()` is true, False after `timeout` seconds.

        The engine calls `condition` again whenever a request is queued, aborted or finished, a
        caller asks for `clear`, or the engine drains or closes. The calls hold the engine's lock,
        so `condition` must be quick.
        """
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout))

    def clear(self) -> None:
        """Forget computed prefixes and give cached device memory back; returns when it is done.

        Raises `EngineClosed` when the engine ends, or does not get to it within a minute.
        """
        done: Future[None] = Future()
        with self._changed:
            if self.life.is_closed:
                raise EngineClosed(SHUTTING_DOWN)
            self._clears.append(done)
            self._changed.notify_all()
        try:
            done.result(timeout=PATIENCE_SECONDS)
        except TimeoutError:
            raise EngineClosed("the engine is too busy; try again later") from None

    def step(self) -> bool:
        """Compute a token for every running request, and some of the prompts that are left.

        Each output is delivered at once. False when there was nothing to do.
        """
        self._drop()
        self._admit()
        has_work = self.running > 0
        for request, output in self._batch.step():
            self._deliver(request, output)
        return has_work

    def run(self) -> None:
        """Serve until it is stopped or drained, or fails itself; whoever is left is told why."""
        reason: StreamGeneratorError = EngineClosed(SHUTTING_DOWN)
        try:
            while self._wait_for_work():
                self._forget_prefixes()
                with self.life.step():
                    self.step()
        except BaseException:
            logger.exception("the engine failed; restart the service")
            reason = GenerationFailed("the engine failed; the service must be restarted")
            self._move(EngineState.FAILED)
        finally:
            self._fail_all(reason)

    def start(self) -> Self:
        """Run on a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()
        return self

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return self._batch.running

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._batch.waiting)

    @property
    def requests(self) -> list[Request]:
        """The requests that wait or run, in the order of their arrival."""
        with self._changed:
            return [stream.request for stream in self._streams.values()]

    @property
    def pending_clears(self) -> int:
        """Calls of `clear` that the computing thread has not served yet."""
        return len(self._clears)

    def drain(self, seconds: float) -> None:
        """Take nothing new; `run` returns when all is finished, or after so long. A signal handler
        may call it."""
        with self._changed:
            self.life.drain(seconds)
            self._changed.notify_all()

    def close(self, reason: str = SHUTTING_DOWN) -> None:
        """Take nothing new, end the thread of `start`, and fail what is left."""
        self._move(EngineState.CLOSED)
        if self._thread is not None:
            self._thread.join()
        self._fail_all(EngineClosed(reason))

    def _move(self, state: EngineState) -> None:
        with self._changed:
            self.life.move(state)
            self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when the engine is to close."""
        with self._changed:
            while not (self._streams or self._clears or self._is_over):
                # With a limit: a signal handler may move the state on this very thread, just before
                # it begins to wait, and its notification then finds nobody.
                self._changed.wait(timeout=1.0)
            return not self._is_over

    @property
    def _is_over(self) -> bool:
        return self.life.is_closed or self.life.is_drained(idle=not self._streams)

    def _drop(self) -> None:
        """Release every request that nobody reads any more, or that would begin too late."""
        for request in self.requests:
            if request.abort_requested:
                self._deliver(request, request.abort())
            elif request.is_late and request.first_token_at is None:
                late = TimeLimitReached("no token came within the time limit; try again later")
                self._deliver(request, request.fail(late))

    def _admit(self) -> None:
        """Let as many start as there are slots, and tell the others their new places."""
        with self._changed:
            if not self._batch.admit():
                return
            for position, request in enumerate(self._batch.waiting, start=1):
                self._streams[request.id].put(QueuePosition(position))

    def _deliver(self, request: Request, output: TokenOutput) -> None:
        """Hand an output to its reader; a finished request leaves the engine first."""
        stream = self._streams[request.id]
        if output.finish_reason is not None:
            sound = output.finish_reason is not FinishReason.ERROR
            self._leave(request, keep=sound)
            self._batch.release(request, sound=sound)
        stream.put(output)

    def _leave(self, request: Request, *, keep: bool) -> None:
        """Forget a request that has ended. keep: what it has computed may serve others."""
        with self._changed:
            del self._streams[request.id]
            self._batch.remove(request, keep=keep)
            self._changed.notify_all()

    def _forget_prefixes(self) -> None:
        """Do what `clear` asks for, once for all who have asked."""
        with self._changed:
            asked, self._clears = self._clears, []
        if asked:
            self._batch.clear()
        for done in asked:
            done.set_result(None)

    def _fail_all(self, reason: StreamGeneratorError) -> None:
        """The end: nothing new comes in, and whoever still waits is told why.

        The device is not touched: it may be what has failed.
        """
        with self._changed:
            self._move(EngineState.CLOSED)
            streams, clears = list(self._streams.values()), self._clears
        for stream in streams:
            output = stream.request.fail(reason)
            self._leave(stream.request, keep=False)
            stream.put(output)
        for done in clears:
            done.set_exception(reason)


def _each(
    prompts: Iterable[Iterable[int]], params: SamplingParams, n: int
) -> Iterator[tuple[list[int], SamplingParams]]:
    """Each prompt `n` times, with a seed of its own where there is one."""
    for prompt in map(list, prompts):
        for i in range(n):
            if params.seed is None:
                yield prompt, params
            else:
                yield prompt, params.model_copy(update={"seed": (params.seed + i) % 2**63})

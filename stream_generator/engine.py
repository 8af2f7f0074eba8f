"""The one thread that computes, and the streams it fills."""

import gc
import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Self

import torch

from stream_generator.checkpoint import Checkpoint
from stream_generator.errors import (
    DuplicateRequest,
    EngineClosed,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    StreamGeneratorError,
    TimeLimitReached,
)
from stream_generator.model_runner import Runner, runner_for
from stream_generator.prefix_cache import PrefixCache
from stream_generator.sampler import Sampled
from stream_generator.sampling_params import SamplingParams
from stream_generator.scheduler import Plan, Scheduler
from stream_generator.sequence import (
    FinishReason,
    QueuePosition,
    Sequence,
    TokenOutput,
)
from stream_generator.token_stream import TokenStream

logger = logging.getLogger(__name__)

WAITING_CONTEXTS = 16  # the tokens of all prompts that wait, in contexts of the model
STUCK_SECONDS = 60.0  # a step that takes longer, and ten times the longest before it, hangs
PATIENCE_SECONDS = 60.0  # of those who wait for the computing thread
SHUTTING_DOWN = "the service is shutting down; send the request again later"


class Engine:
    """Serves many requests at once from one model, on one computing thread.

    Every method but `run` and `step` may be called from any thread. `run` computes, on the thread
    that calls it, until `stop`; `start` gives it one of its own; a test may call `step` itself.

    Best on the thread that has loaded the model: each thread that computes gets an OpenMP team of
    its own, and GNU OpenMP stops spinning between parallel regions when there are more threads in
    teams than processors. On 2 cores that costs nearly a third (`docs/performance.md`).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_waiting: int = 32,
        max_seconds: float | None = None,
        runner: Runner | None = None,
    ):
        """max_waiting: requests in the queue; their prompts hold 16 contexts' tokens at most.
        max_seconds: for each request, from `submit` on.
        runner: by default the one that fits the model, as large as the memory allows.
        """
        self._runner = runner or runner_for(checkpoint.model, checkpoint.context_length)
        self.checkpoint = replace(checkpoint, context_length=self._runner.context_length)
        self.max_waiting = max_waiting
        self.max_waiting_tokens = WAITING_CONTEXTS * self.checkpoint.context_length
        self.max_running = self._runner.slots
        self._max_seconds = max_seconds
        self._changed = threading.Condition()  # guards the streams, the scheduler and the rest
        self._streams: dict[str, TokenStream] = {}  # waiting and running, by request id
        self._scheduler = Scheduler()
        self._clears: list[Future[None]] = []  # those who wait for `clear`
        self._closing = False
        self._drained_by: float | None = None  # when the last streams must have ended
        self._step_began: float | None = None
        self._longest_step = 0.0  # seconds
        self.failed = False  # whether the engine itself has failed, not a request
        self._thread: threading.Thread | None = None
        self._prefixes = PrefixCache(self._runner.slots)  # of the computing thread alone

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
        if params.logprobs is not None and not self._runner.has_logprobs:
            raise InvalidRequest(
                "this model runs one request at a time and tells no log-probabilities; leave "
                "logprobs out",
                param="logprobs",
            )
        first_id = request_id or uuid.uuid4().hex
        streams: list[TokenStream] = []
        for prompt in map(list, prompts):
            for i in range(n):
                name = f"{first_id}#{len(streams)}" if streams else first_id
                sequence = self.checkpoint.new_sequence(
                    prompt, _with_seed(params, i), request_id=name
                )
                if self._max_seconds is not None:
                    sequence.deadline = sequence.submitted_at + self._max_seconds
                streams.append(TokenStream(sequence, self.abort))
        if len(streams) > self.max_waiting + self.max_running:
            raise InvalidRequest(
                f"{len(streams)} replies are more than the {self.max_waiting + self.max_running} "
                "that are served and wait at a time; ask for fewer",
                param="n",
            )
        tokens = sum(len(stream.sequence.prompt_ids) for stream in streams)
        if len(streams) > 1 and tokens > self.max_waiting_tokens:
            raise InvalidRequest(
                f"the prompts have {tokens} tokens in all, and {self.max_waiting_tokens} may wait; "
                "ask for fewer replies at a time",
                param="n",
            )
        with self._changed:
            self._refuse_if_full(streams)
            for stream in streams:
                self._streams[stream.id] = stream
                self._scheduler.add(stream.sequence)
                if (position := len(self._scheduler.waiting) - self._prefixes.free) > 0:
                    stream.put(QueuePosition(position))
            self._changed.notify_all()
        return streams

    def _refuse_if_full(self, streams: list[TokenStream]) -> None:
        """Raise what speaks against taking these in. `_changed` is held."""
        if self._closing or self._drained_by is not None:
            raise EngineClosed(SHUTTING_DOWN)
        for stream in streams:
            if stream.id in self._streams:
                raise DuplicateRequest(f"a request with the id {stream.id} is still running")
        waiting, free = self._scheduler.waiting, self._prefixes.free
        tokens = sum(len(s.prompt_ids) for s in [*waiting, *(x.sequence for x in streams)])
        if len(waiting) + len(streams) > self.max_waiting + free:
            raise QueueFull(f"{len(waiting)} requests are waiting already; try again in a while")
        # A prompt that would wait alone is let in, however long.
        if waiting and len(waiting) + len(streams) > free and tokens > self.max_waiting_tokens:
            raise QueueFull(
                "the prompts that are waiting are too long in all; try again in a while"
            )

    def abort(self, sequence: Sequence) -> None:
        """End a request whose reader has left, when the step in progress ends."""
        with self._changed:
            sequence.abort_requested = True
            self._changed.notify_all()

    def wait_until_ended(self, sequence: Sequence) -> bool:
        """Return when a sequence that was submitted has its finish reason; False: not in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: sequence.finish_reason is not None, PATIENCE_SECONDS
            )

    def clear(self) -> None:
        """Forget computed prefixes and give cached device memory back; returns when it is done.

        Raises `EngineClosed` when the engine ends, or does not get to it within a minute.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise EngineClosed(SHUTTING_DOWN)
            self._clears.append(done)
            self._changed.notify_all()
        try:
            done.result(timeout=PATIENCE_SECONDS)
        except TimeoutError:
            raise EngineClosed("the engine is too busy; try again later") from None

    def step(self) -> bool:
        """Compute one token for every running sequence; False when there was nothing to do.

        And some more of the prompts that are not computed yet. What is there is delivered at once.
        """
        self._drop()
        self._admit()
        plan = self._scheduler.plan()
        for sequence, sampled in self._compute(plan):
            self._deliver(sequence, _taken(sequence, sampled))
        return not plan.is_empty

    def run(self) -> None:
        """Serve until it is stopped or drained, or fails itself; whoever is left is told why."""
        reason: StreamGeneratorError = EngineClosed(SHUTTING_DOWN)
        try:
            while self._wait_for_work():
                self._forget_prefixes()
                self._step_began = began = time.monotonic()
                self.step()
                self._step_began = None
                self._longest_step = max(self._longest_step, time.monotonic() - began)
        except BaseException:
            logger.exception("the engine failed; restart the service")
            reason = GenerationFailed("the engine failed; the service must be restarted")
            self.failed = True
        finally:
            self._fail_all(reason)

    def start(self) -> Self:
        """Run on a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self._thread.start()
        return self

    @property
    def healthy(self) -> bool:
        """Whether it computes, or would; also while it drains."""
        began = self._step_began
        limit = max(STUCK_SECONDS, 10 * self._longest_step)
        stuck = began is not None and time.monotonic() - began > limit
        return not (self.failed or self._closing or stuck)

    @property
    def accepting(self) -> bool:
        """Whether requests that are submitted now will be served."""
        return self.healthy and self._drained_by is None

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._scheduler.waiting)

    def drain(self, seconds: float) -> None:
        """Take nothing new; `run` returns when all is finished, or after so long. Also from a
        signal handler."""
        with self._changed:
            self._drained_by = time.monotonic() + seconds
            self._changed.notify_all()

    def stop(self) -> None:
        """Let `run` return after its step. Also from a signal handler."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take nothing new, end the thread of `start`, and fail what is left."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._fail_all(EngineClosed(SHUTTING_DOWN))

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when the engine is to close."""
        while True:
            with self._changed:
                # With a limit: a signal handler may set `_closing` on this very thread, just before
                # it begins to wait, and its notification then finds nobody.
                if self._changed.wait_for(self._has_work, timeout=1.0):
                    return not self._closing and not self._drained()

    def _has_work(self) -> bool:
        return bool(self._streams or self._clears or self._closing or self._drained())

    def _drained(self) -> bool:
        limit = self._drained_by
        return limit is not None and (not self._streams or time.monotonic() >= limit)

    def _drop(self) -> None:
        """Release every sequence that nobody reads any more, or that would begin too late."""
        with self._changed:
            sequences = [stream.sequence for stream in self._streams.values()]
        for sequence in sequences:
            if sequence.abort_requested:
                self._deliver(sequence, sequence.abort())
            elif sequence.is_late and sequence.first_token_at is None:
                late = TimeLimitReached("no token came within the time limit; try again later")
                self._deliver(sequence, sequence.fail(late))

    def _admit(self) -> None:
        """Give free slots to those who have waited longest, with what is computed for them."""
        with self._changed:
            if not self._scheduler.admit(self._place):
                return
            for position, sequence in enumerate(self._scheduler.waiting, start=1):
                self._streams[sequence.id].put(QueuePosition(position))

    def _place(self, sequence: Sequence) -> bool:
        placement = self._prefixes.place(sequence)
        if placement is None:
            return False
        if placement.length and placement.source != placement.slot:
            self._runner.copy_prefix(placement.source, placement.slot, placement.length)
        sequence.start(placement.slot, placement.length)
        return True

    def _compute(self, plan: Plan) -> Iterator[tuple[Sequence, Sampled]]:
        """The new ids of a step: of those who decode, then of each prompt that is complete."""
        yield from self._decode(plan.decode)
        for chunk in plan.prefill:
            first = self._prefill(chunk.sequence, chunk.length)
            if first is not None:
                yield chunk.sequence, first

    def _prefill(self, sequence: Sequence, length: int) -> Sampled | None:
        """Up to `length` more ids of a prompt; the first new id when it is complete."""
        started = time.perf_counter()
        try:
            self._reuse_prefix(sequence)
            length = min(length, sequence.uncomputed)
            first = self._runner.prefill(sequence, length)
        except Exception as error:  # of this prompt alone: nothing else was computed with it
            first = _failure(sequence, error)
        self._scheduler.pace.record_prefill(time.perf_counter() - started, length)
        return first

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Before a prompt begins, look again: a neighbour may have computed its beginning since.

        So requests that arrive together with one prompt, or one system prompt, compute it once.
        """
        if sequence.computed > sequence.cached_tokens:
            return
        source, length = self._prefixes.longest(sequence)
        if length > sequence.computed and sequence.slot is not None:
            self._runner.copy_prefix(source, sequence.slot, length)
            sequence.computed = sequence.cached_tokens = length

    def _decode(self, sequences: list[Sequence]) -> list[tuple[Sequence, Sampled]]:
        """One more id for each.

        Where memory is short the newest request goes, and the others are tried again. Any other
        failure is tried again for each alone, so that it stays with the one it belongs to.
        """
        if not sequences:
            return []
        started = time.perf_counter()
        try:
            sampled = self._runner.decode(sequences)
        except Exception as error:
            if len(sequences) == 1:
                return [(sequences[0], _failure(sequences[0], error))]
            if isinstance(error, torch.OutOfMemoryError):
                newest = max(sequences, key=lambda s: s.submitted_at)
                others = [s for s in sequences if s is not newest]
                return [*self._decode(others), (newest, _failure(newest, error))]
            logger.warning("a step for %d requests failed; trying each alone", len(sequences))
            return [result for sequence in sequences for result in self._decode([sequence])]
        self._scheduler.pace.record_decode(time.perf_counter() - started)
        return list(zip(sequences, sampled, strict=True))

    def _deliver(self, sequence: Sequence, output: TokenOutput) -> None:
        """Hand an output to its reader; a finished sequence leaves the engine first."""
        stream = self._streams[sequence.id]
        if output.finish_reason is not None:
            sound = output.finish_reason is not FinishReason.ERROR
            self._leave(sequence, keep=sound and self._runner.keeps_prefixes)
            if sequence.slot is not None:
                self._runner.release(sequence, sound=sound)
        stream.put(output)

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        """Forget a sequence that has ended. keep: what it has computed may serve others."""
        with self._changed:
            del self._streams[sequence.id]
            self._scheduler.remove(sequence)
            self._prefixes.release(sequence, keep=keep)
            self._changed.notify_all()

    def _forget_prefixes(self) -> None:
        """Do what `clear` asks for, once for all who have asked."""
        with self._changed:
            asked, self._clears = self._clears, []
        if not asked:
            return
        self._prefixes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for done in asked:
            done.set_result(None)

    def _fail_all(self, reason: StreamGeneratorError) -> None:
        """The end: nothing new comes in, and whoever still waits is told why.

        The device is not touched: it may be what has failed.
        """
        with self._changed:
            self._closing = True
            streams, clears = list(self._streams.values()), self._clears
        for stream in streams:
            output = stream.sequence.fail(reason)
            self._leave(stream.sequence, keep=False)
            stream.put(output)
        for done in clears:
            done.set_exception(reason)


def _with_seed(params: SamplingParams, offset: int) -> SamplingParams:
    if params.seed is None or not offset:
        return params
    return params.model_copy(update={"seed": (params.seed + offset) % 2**63})


def _taken(sequence: Sequence, sampled: Sampled) -> TokenOutput:
    """What a sequence makes of its new id; turning it into text may fail, as computing may."""
    if isinstance(sampled, GenerationFailed):
        return sequence.fail(sampled)
    try:
        return sequence.take(sampled)
    except Exception as error:
        return sequence.fail(_failure(sequence, error))


def _failure(sequence: Sequence, error: Exception) -> GenerationFailed:
    """What the reader is told. Details stay in the log: they may hold paths or addresses.

    Where the device is lost for this process, the error goes on: nothing would ever succeed again.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    logger.error("request %s failed", sequence.id, exc_info=error)
    if isinstance(error, GenerationFailed):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return GenerationFailed("out of memory; shorten the prompt or lower max_new_tokens")
    return GenerationFailed(
        f"generation failed ({type(error).__name__}); the service's log has the details"
    )

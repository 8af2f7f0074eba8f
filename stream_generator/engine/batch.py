"""The requests that an engine serves, and one step of computing for them."""

import gc
import logging
import time
from collections.abc import Collection, Iterator

import torch

from stream_generator.engine.prefix_cache import PrefixCache
from stream_generator.engine.runner import Runner
from stream_generator.engine.scheduler import Pace, Plan, Scheduler, chunk_length
from stream_generator.errors import GenerationFailed
from stream_generator.request import Request, TokenOutput
from stream_generator.sampling.sampler import Sampled

logger = logging.getLogger(__name__)


class Batch:
    """Holds waiting and running requests, and computes one step for the running requests.

    The batch has no lock. The engine holds its own lock when it calls `add`, `admit` or `remove`.
    Only these three methods change `waiting` and `free_slots`, so any thread may read these two
    properties under the engine's lock. Everything else is for the computing thread alone.
    """

    def __init__(self, runner: Runner, *, prompts_only: bool, pace: Pace | None = None):
        """prompts_only: see `PrefixCache`. pace: see `Scheduler`."""
        self._runner = runner
        self._scheduler = Scheduler(pace, smallest_chunk=runner.smallest_chunk)
        self._prefixes = PrefixCache(
            runner.slots, smallest_chunk=runner.smallest_chunk, prompts_only=prompts_only
        )

    @property
    def waiting(self) -> Collection[Request]:
        """Requests without a slot, in the order in which they will get one."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """How many requests have a slot."""
        return len(self._scheduler.running)

    @property
    def free_slots(self) -> int:
        """How many slots have no request."""
        return self._prefixes.free

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._scheduler.add(request)

    def admit(self) -> list[Request]:
        """Assign free slots to the oldest waiting requests. Return the started requests."""
        return self._scheduler.admit(self._assign_slot)

    def step(self) -> Iterator[tuple[Request, TokenOutput]]:
        """Decode one token per request in decode, and compute the next chunks of prompts.

        Yields each output immediately: decoded tokens first, then the first reply token of each
        prompt that is now complete.
        """
        for request, sampled in self._compute(self._scheduler.plan()):
            yield request, _append(request, sampled)

    def remove(self, request: Request, *, keep: bool) -> None:
        """Release a request's slot. keep: later prompts may reuse its keys and values."""
        self._scheduler.remove(request)
        self._prefixes.release(request, keep=keep and self._runner.keeps_prefixes)

    def release(self, request: Request, *, sound: bool) -> None:
        """Tell the runner that a request has finished; see `Runner.release`."""
        if request.slot is not None:
            self._runner.release(request, sound=sound)

    def clear(self) -> None:
        """Forget the prefixes of finished requests, and return cached memory to the system."""
        self._prefixes.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _assign_slot(self, request: Request) -> bool:
        assigned = self._prefixes.assign(request)
        if assigned is None:
            return False
        if assigned.length and assigned.source != assigned.slot:
            self._runner.copy_prefix(assigned.source, assigned.slot, assigned.length)
        request.start(assigned.slot, assigned.length)
        return True

    def _compute(self, plan: Plan) -> Iterator[tuple[Request, Sampled]]:
        yield from self._decode(plan.decode)
        for chunk in plan.prefill:
            first = self._prefill(chunk.request, chunk.length)
            if first is not None:
                yield chunk.request, first

    def _prefill(self, request: Request, length: int) -> Sampled | None:
        """Compute up to `length` ids of a prompt. Return the first new id after the last chunk."""
        started = time.perf_counter()
        try:
            self._reuse_prefix(request)
            length = chunk_length(
                request.num_uncomputed_tokens, length, self._runner.smallest_chunk
            )
            first = self._runner.prefill(request, length)
        except Exception as error:  # no other request was computed with this prompt
            first = _failure(request, error)
        self._scheduler.pace.record_prefill(time.perf_counter() - started, length)
        return first

    def _reuse_prefix(self, request: Request) -> None:
        """Before a prompt begins, look for a prefix that was computed since the slot was assigned.

        Requests that arrive together with the same prompt or system prompt compute it only once.
        """
        if request.num_computed_tokens > request.num_cached_tokens:
            return
        source, length = self._prefixes.longest(request)
        if length > request.num_computed_tokens and request.slot is not None:
            self._runner.copy_prefix(source, request.slot, length)
            request.num_computed_tokens = request.num_cached_tokens = length

    def _decode(self, requests: list[Request]) -> list[tuple[Request, Sampled]]:
        """Compute one new id for each request.

        If memory runs out, the newest request fails, and the step is tried again without it. After
        any other failure, each request is tried alone, so that only the faulty request fails.
        """
        if not requests:
            return []
        started = time.perf_counter()
        try:
            sampled = self._runner.decode(requests)
        except Exception as error:
            if len(requests) == 1:
                return [(requests[0], _failure(requests[0], error))]
            if isinstance(error, torch.OutOfMemoryError):
                newest = max(requests, key=lambda r: r.submitted_at)
                others = [r for r in requests if r is not newest]
                return [*self._decode(others), (newest, _failure(newest, error))]
            logger.warning("a step of %d requests failed; trying each request alone", len(requests))
            return [result for request in requests for result in self._decode([request])]
        self._scheduler.pace.record_decode(time.perf_counter() - started)
        return list(zip(requests, sampled, strict=True))


def _append(request: Request, sampled: Sampled) -> TokenOutput:
    """Append a new id to its request. If the id cannot be decoded, the request fails."""
    if isinstance(sampled, GenerationFailed):
        return request.fail(sampled)
    try:
        return request.append(sampled)
    except Exception as error:
        return request.fail(_failure(request, error))


def _failure(request: Request, error: Exception) -> GenerationFailed:
    """Log an error, and convert it for the client. Only the log may contain paths or addresses.

    Raises `error` again if the device is lost: no computation can succeed in this process then.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    logger.error("request %s failed", request.id, exc_info=error)
    if isinstance(error, GenerationFailed):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return GenerationFailed("out of memory; shorten the prompt or lower max_new_tokens")
    return GenerationFailed(
        f"generation failed ({type(error).__name__}); the service's log has the details"
    )

"""One request's whole state, and what comes out of it. No torch here."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from stream_generator.errors import StreamGeneratorError
from stream_generator.sampling_params import SamplingParams
from stream_generator.text.detokenizer import Detokenizer
from stream_generator.text.stop_strings import StopStrings


class RequestStatus(StrEnum):
    """How far a request has come."""

    WAITING = "waiting"  # for a slot
    PREFILL = "prefill"  # its prompt is computed
    DECODE = "decode"  # it gets a new id in every step
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request has finished."""

    STOP = "stop"  # an end-of-sequence id or a stop string
    LENGTH = "length"  # max_new_tokens, the context is full, or its time is over
    ABORT = "abort"  # the reader left
    ERROR = "error"  # computing failed


@dataclass(frozen=True, slots=True)
class Choice:
    """The id that a step chose. If asked for: its log-probability and the likeliest ids' own, from
    the model's own distribution, before any processor."""

    token_id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step added to a request. The last one of a request has a `finish_reason`.

    Without a `choice`, nothing was shown of what was chosen: an end id, or no step at all.
    """

    delta: str
    choice: Choice | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """How many requests are still before this one."""

    position: int


@dataclass(eq=False)
class Request:
    """One request: its prompt, its parameters, and all that changes while it runs.

    `params` are resolved: no gap that matters is left (see `SamplingParams.resolved`).
    Invariant: `text` is the joined deltas of all outputs, and once `finish_reason` is set nothing
    changes any more.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    end_ids: Collection[int]
    context_length: int
    detokenizer: Detokenizer
    output_ids: list[int] = field(default_factory=list)
    deltas: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: StreamGeneratorError | None = None
    abort_requested: bool = False
    slot: int | None = None  # its row in the cache, while it runs
    num_computed_tokens: int = 0  # how many of its ids have their keys and values there
    num_cached_tokens: int = 0  # how many of its prompt were there when it came
    generator: Any = None  # the request's own torch.Generator
    uniform: float | None = None  # drawn for the next id; kept until that id is appended
    deadline: float | None = None  # by time.monotonic(): no token begins after it
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None

    def __post_init__(self) -> None:
        self._stop_strings = StopStrings(self.params.stop or ())

    @property
    def text(self) -> str:
        """All of the reply so far."""
        return "".join(self.deltas)

    @property
    def all_ids(self) -> list[int]:
        """Prompt and reply so far."""
        return self.prompt_ids + self.output_ids

    @property
    def status(self) -> RequestStatus:
        """How far it has come."""
        if self.finish_reason is not None:
            return RequestStatus.FINISHED
        if self.started_at is None:
            return RequestStatus.WAITING
        return RequestStatus.PREFILL if self.num_uncomputed_tokens else RequestStatus.DECODE

    @property
    def num_uncomputed_tokens(self) -> int:
        """How many ids of the prompt are still to be computed."""
        return max(len(self.prompt_ids) - self.num_computed_tokens, 0)

    @cached_property
    def all_end_ids(self) -> frozenset[int]:
        """The model's end ids and the request's own stop ids."""
        return frozenset((*self.end_ids, *(self.params.stop_token_ids or ())))

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def is_full(self) -> bool:
        """Whether the length limit, or the end of the context, is reached."""
        length = len(self.output_ids)
        limit = self.params.max_new_tokens
        return (limit is not None and length >= limit) or length + len(
            self.prompt_ids
        ) >= self.context_length

    def start(self, slot: int, cached: int) -> None:
        """Its turn has come: row `slot` is its own, with `cached` of its prompt ids computed."""
        self.started_at = time.monotonic()
        self.slot, self.num_computed_tokens, self.num_cached_tokens = slot, cached, cached

    def append(self, choice: Choice) -> TokenOutput:
        """Take the id that was computed last. The one place that decides how a request ends.

        An end id ends it and is neither shown nor counted.
        """
        token_id, self.uniform = choice.token_id, None
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        if token_id in self.all_end_ids:
            return self._finish(FinishReason.STOP)
        self.output_ids.append(token_id)
        self.last_token_at = time.monotonic()
        delta, stopped = self._stop_strings.feed(self.detokenizer.decode(token_id))
        if stopped:
            return self._finish(FinishReason.STOP, choice, delta, flush=False)
        if self.is_full or self.is_late:
            return self._finish(FinishReason.LENGTH, choice, delta)
        self.deltas.append(delta)
        return TokenOutput(delta, choice)

    def abort(self) -> TokenOutput:
        """Finish it because its client wants no more of it."""
        return self._finish(FinishReason.ABORT, flush=False)

    def fail(self, error: StreamGeneratorError) -> TokenOutput:
        """Finish it because computing failed; `error` is raised at the reader's."""
        self.error = error
        return self._finish(FinishReason.ERROR, flush=False)  # flushing is what may have failed

    def _finish(
        self,
        reason: FinishReason,
        choice: Choice | None = None,
        delta: str = "",
        *,
        flush: bool = True,
    ) -> TokenOutput:
        if flush:
            tail, stopped = self._stop_strings.feed(self.detokenizer.flush())
            tail += self._stop_strings.flush()
            if stopped:
                reason = FinishReason.STOP
            delta += tail
        self.deltas.append(delta)
        self.finish_reason = reason
        self.finished_at = time.monotonic()
        return TokenOutput(delta, choice, reason)

"""The state of one request, and its outputs. Does not import torch."""

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
    PREFILL = "prefill"  # the engine computes its prompt
    DECODE = "decode"  # each step computes its next id
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request has finished."""

    STOP = "stop"  # an end id or a stop string
    LENGTH = "length"  # max_new_tokens, the end of the context, or the time limit
    ABORT = "abort"  # the client ended it
    ERROR = "error"  # computing failed


@dataclass(frozen=True, slots=True)
class Choice:
    """The id that a step chose, with log-probabilities if the request wants them.

    alternatives: the most likely ids and their log-probabilities. All log-probabilities are those
    of the model's own distribution, before any processor.
    """

    token_id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step added to a reply. The last output of a request has a `finish_reason`.

    `choice` is None if the step chose an end id, or if the request finished without a step.
    """

    delta: str
    choice: Choice | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """The place of a request in the queue, from 1."""

    position: int


@dataclass(eq=False)
class Request:
    """One request: its prompt, its parameters, and all state that changes while it runs.

    `params` are resolved (see `SamplingParams.resolved`). Invariant: `text` is the joined deltas
    of all outputs. Once `finish_reason` is set, nothing changes any more.
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
    slot: int | None = None  # where the cache holds its keys and values, while it runs
    num_computed_tokens: int = 0  # ids whose keys and values are in the slot
    num_cached_tokens: int = 0  # prompt ids that the prefix cache provided
    generator: Any = None  # a torch.Generator of this request alone
    uniform: float | None = None  # drawn for the next id; kept until that id is appended
    deadline: float | None = None  # by time.monotonic(); the first token after it is the last
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None

    def __post_init__(self) -> None:
        self._stop_strings = StopStrings(self.params.stop or ())

    @property
    def text(self) -> str:
        """The text of the reply so far."""
        return "".join(self.deltas)

    @property
    def all_ids(self) -> list[int]:
        """The ids of the prompt and of the reply so far."""
        return self.prompt_ids + self.output_ids

    @property
    def status(self) -> RequestStatus:
        """How far the request has come."""
        if self.finish_reason is not None:
            return RequestStatus.FINISHED
        if self.started_at is None:
            return RequestStatus.WAITING
        return RequestStatus.PREFILL if self.num_uncomputed_tokens else RequestStatus.DECODE

    @property
    def num_uncomputed_tokens(self) -> int:
        """How many prompt ids are not computed yet."""
        return max(len(self.prompt_ids) - self.num_computed_tokens, 0)

    @cached_property
    def all_end_ids(self) -> frozenset[int]:
        """The model's end ids and the request's own stop ids."""
        return frozenset((*self.end_ids, *(self.params.stop_token_ids or ())))

    @property
    def is_late(self) -> bool:
        """Whether the time limit has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    @property
    def is_full(self) -> bool:
        """Whether the reply has reached `max_new_tokens` or the end of the context."""
        limit = self.params.max_new_tokens
        if limit is not None and len(self.output_ids) >= limit:
            return True
        return len(self.prompt_ids) + len(self.output_ids) >= self.context_length

    def start(self, slot: int, cached: int) -> None:
        """Start the request in `slot`, which holds the keys and values of `cached` prompt ids."""
        self.started_at = time.monotonic()
        self.slot, self.num_computed_tokens, self.num_cached_tokens = slot, cached, cached

    def append(self, choice: Choice) -> TokenOutput:
        """Append the newest id, and decide whether the reply is finished.

        An end id finishes the reply; it is neither delivered nor counted.
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
        """Finish the request because its client ended it."""
        return self._finish(FinishReason.ABORT, flush=False)

    def fail(self, error: StreamGeneratorError) -> TokenOutput:
        """Finish the request because computing failed. Its reader gets `error` as an exception."""
        self.error = error
        return self._finish(FinishReason.ERROR, flush=False)  # the flush may be what failed

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

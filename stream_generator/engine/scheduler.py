"""Who runs in the next step, under a budget of time. No torch here."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stream_generator.request import Request, RequestStatus

FIRST_CHUNK = 64  # prompt tokens in a step, before anything has been measured
SMALLEST_CHUNK = 16  # less would waste most of a forward, and starve the prompt
LARGEST_CHUNK = 512  # more would make those who leave wait for it
SMOOTHING = 0.2  # weight of the newest measurement


@dataclass(frozen=True)
class Chunk:
    """`length` more ids of a prompt."""

    request: Request
    length: int


@dataclass
class Plan:
    """One step: a token for each of `decode`, and some chunks of prompts."""

    decode: list[Request] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.prefill


class Pace:
    """How fast steps have been lately, and how long a prompt's chunk may therefore be."""

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._seconds_per_prompt_token: float | None = None

    def record_decode(self, seconds: float) -> None:
        self._decode_seconds = _smoothed(self._decode_seconds, seconds)

    def record_prefill(self, seconds: float, tokens: int) -> None:
        self._seconds_per_prompt_token = _smoothed(self._seconds_per_prompt_token, seconds / tokens)

    def budget(self, others_decode: bool) -> int:
        """Prompt tokens for the next step.

        Beside running streams, as many as take about the time of one decode: so that a step
        takes at most about twice their current gap.
        """
        if not others_decode:
            return LARGEST_CHUNK
        if not self._decode_seconds or not self._seconds_per_prompt_token:
            return FIRST_CHUNK
        fitting = int(self._decode_seconds / self._seconds_per_prompt_token)
        return min(max(fitting, SMALLEST_CHUNK), LARGEST_CHUNK)


class Scheduler:
    """Keeps the order: requests wait, are admitted to a slot, have their prompt computed, decode.

    Every running request past its prompt decodes in every step, and prompts get a budget of ids
    beside them: neither starves the other. The budget goes, in turns, first to the oldest prompt
    and first to the one that has least left; what that one does not need goes to the next. So a
    short prompt does not wait for a long one before it, nor a long one for all the short ones.
    """

    def __init__(self, pace: Pace | None = None, *, smallest_chunk: int = 1) -> None:
        """smallest_chunk: ids of a prompt that may be computed together, at least."""
        self._smallest_chunk = smallest_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pace = pace or Pace()
        self._oldest_first = True  # in the next step

    def add(self, request: Request) -> None:
        """Let it wait behind all the others."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget it, wherever it stands."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def admit(self, assign_slot: Callable[[Request], bool]) -> list[Request]:
        """Start waiting requests, oldest first, while `assign_slot` finds a slot; return them."""
        admitted = []
        while self.waiting and assign_slot(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        self.running += admitted
        return admitted

    def plan(self) -> Plan:
        """What the next step computes."""
        decode = [r for r in self.running if r.status is RequestStatus.DECODE]
        prompts = [r for r in self.running if r.status is RequestStatus.PREFILL]
        if not self._oldest_first:
            prompts.sort(key=lambda r: r.num_uncomputed_tokens)
        self._oldest_first = not (self._oldest_first and prompts)
        budget = self.pace.budget(bool(decode))
        chunks = []
        for request in prompts:
            if budget < min(request.num_uncomputed_tokens, SMALLEST_CHUNK):
                break
            length = chunk_length(request.num_uncomputed_tokens, budget, self._smallest_chunk)
            chunks.append(Chunk(request, length))
            budget -= chunks[-1].length
        return Plan(decode, chunks)


def chunk_length(uncomputed: int, most: int, smallest: int) -> int:
    """How many of a prompt's ids to compute now, so that none or `smallest` are left."""
    length = min(uncomputed, most)
    left = uncomputed - length
    return length - max(smallest - left, 0) if left else length


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)

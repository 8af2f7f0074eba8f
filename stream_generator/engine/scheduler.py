"""Plan which requests and which prompt chunks the next step computes. No torch."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stream_generator.request import Request, RequestStatus

FIRST_CHUNK = 64  # prompt tokens of a step, before any step has been measured
SMALLEST_CHUNK = 16  # a smaller chunk would waste most of a forward, and starve the prompt
LARGEST_CHUNK = 512  # a larger chunk would delay aborts
SMOOTHING = 0.2  # weight of the newest measurement


@dataclass(frozen=True)
class Chunk:
    """The next `length` ids of a prompt."""

    request: Request
    length: int


@dataclass
class Plan:
    """One step: one token for each request of `decode`, and the prompt chunks of `prefill`."""

    decode: list[Request]
    prefill: list[Chunk]


class Pace:
    """Measures recent steps, to decide how many prompt tokens the next step may compute."""

    def __init__(self) -> None:
        self._decode_seconds: float | None = None
        self._seconds_per_prompt_token: float | None = None

    def record_decode(self, seconds: float) -> None:
        self._decode_seconds = _smoothed(self._decode_seconds, seconds)

    def record_prefill(self, seconds: float, tokens: int) -> None:
        self._seconds_per_prompt_token = _smoothed(self._seconds_per_prompt_token, seconds / tokens)

    def budget(self, others_decode: bool) -> int:
        """Return the number of prompt tokens for the next step.

        If other requests decode, the prompt tokens take about as long as one decode. So the gap
        between two tokens of a reply becomes at most about twice as long.
        """
        if not others_decode:
            return LARGEST_CHUNK
        if not self._decode_seconds or not self._seconds_per_prompt_token:
            return FIRST_CHUNK
        fitting = int(self._decode_seconds / self._seconds_per_prompt_token)
        return min(max(fitting, SMALLEST_CHUNK), LARGEST_CHUNK)


class Scheduler:
    """Queues requests, and plans steps that starve neither replies nor prompts.

    Every request in decode gets one token in every step. Prompts share a budget of ids. In one step
    the oldest prompt comes first, in the next step the prompt with the fewest ids left. The rest of
    the budget goes to the next prompts. A short prompt therefore does not wait for an older long
    prompt, and a long prompt does not wait for all short prompts.
    """

    def __init__(self, pace: Pace | None = None, *, smallest_chunk: int = 1) -> None:
        """smallest_chunk: the least number of prompt ids that the runner computes at a time. pace:
        by default, a new `Pace`."""
        self._smallest_chunk = smallest_chunk
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pace = pace or Pace()
        self._oldest_first = True  # in the next plan

    def add(self, request: Request) -> None:
        """Append a request to the queue."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a waiting or running request."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def admit(self, assign_slot: Callable[[Request], bool]) -> list[Request]:
        """Start waiting requests, oldest first, until `assign_slot` returns False. Return them."""
        admitted = []
        while self.waiting and assign_slot(self.waiting[0]):
            admitted.append(self.waiting.popleft())
        self.running += admitted
        return admitted

    def plan(self) -> Plan:
        """Plan the next step."""
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
            budget -= length
        return Plan(decode, chunks)


def chunk_length(uncomputed: int, limit: int, smallest: int) -> int:
    """Return the length of the next chunk. Afterwards either no ids are left, or at least
    `smallest`."""
    length = min(uncomputed, limit)
    left = uncomputed - length
    return length - max(smallest - left, 0) if left else length


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)

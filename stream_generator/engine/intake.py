"""Which requests an engine accepts, and how many at a time."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from stream_generator.errors import InvalidRequest, QueueFull
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import Request
from stream_generator.sampling_params import SamplingParams

WAITING_CONTEXTS = 16  # limit of the tokens of all waiting prompts, in contexts of the model


@dataclass(frozen=True)
class Intake:
    """The limits of an engine.

    running: limit of requests with a slot. waiting: limit of requests in the queue. has_logprobs:
    whether the runner computes log-probabilities. max_seconds: time limit of each request.
    """

    checkpoint: Checkpoint
    running: int
    waiting: int
    has_logprobs: bool
    max_seconds: float | None

    @property
    def waiting_tokens(self) -> int:
        """How many tokens all waiting prompts together may have."""
        return WAITING_CONTEXTS * self.checkpoint.context_length

    @property
    def requests(self) -> int:
        """How many requests may run and wait at a time."""
        return self.running + self.waiting

    def new_request(
        self, prompt_ids: Iterable[int], params: SamplingParams, *, request_id: str
    ) -> Request:
        """Create a request. Raises `PromptTooLong` or `InvalidRequest` if it cannot be served."""
        if params.logprobs is not None and not self.has_logprobs:
            raise InvalidRequest(
                "this model runs one request at a time, without log-probabilities; remove logprobs",
                param="logprobs",
            )
        request = self.checkpoint.new_request(prompt_ids, params, request_id=request_id)
        if self.max_seconds is not None:
            request.deadline = request.submitted_at + self.max_seconds
        return request

    def new_requests(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams, n: int, first_id: str
    ) -> list[Request]:
        """Create `n` requests for each prompt; see `Engine.submit_several`."""
        requests: list[Request] = []
        for prompt, own_params in _repeat(prompts, params, n):
            request_id = f"{first_id}#{len(requests)}" if requests else first_id
            requests.append(self.new_request(prompt, own_params, request_id=request_id))
        self._reject_too_many(requests)
        return requests

    def _reject_too_many(self, requests: Collection[Request]) -> None:
        """Raise `InvalidRequest` if even an idle engine could not accept all of `requests`."""
        if len(requests) > self.requests:
            raise InvalidRequest(
                f"{len(requests)} replies were requested, but only {self.requests} may run and "
                "wait at a time; request fewer",
                param="n",
            )
        tokens = _prompt_tokens(requests)
        if len(requests) > 1 and tokens > self.waiting_tokens:
            raise InvalidRequest(
                f"the prompts have {tokens} tokens together, but only {self.waiting_tokens} may "
                "wait; request fewer replies at a time",
                param="n",
            )

    def reject_if_full(
        self, requests: Collection[Request], waiting: Collection[Request], free_slots: int
    ) -> None:
        """Raise `QueueFull` if the queue has no room for `requests`."""
        together = [*waiting, *requests]
        if len(together) > self.waiting + free_slots:
            raise QueueFull(f"{len(waiting)} requests are waiting already; try again later")
        # A prompt of any length is accepted if no other request is waiting.
        tokens = _prompt_tokens(together)
        if waiting and len(together) > free_slots and tokens > self.waiting_tokens:
            raise QueueFull(
                f"the waiting prompts would have {tokens} tokens together, but only "
                f"{self.waiting_tokens} may wait; try again later"
            )


def _prompt_tokens(requests: Collection[Request]) -> int:
    return sum(len(request.prompt_ids) for request in requests)


def _repeat(
    prompts: Iterable[Iterable[int]], params: SamplingParams, n: int
) -> Iterator[tuple[list[int], SamplingParams]]:
    """Yield each prompt `n` times. A seed grows by one each time."""
    for prompt in map(list, prompts):
        for i in range(n):
            if params.seed is None:
                yield prompt, params
            else:
                yield prompt, params.model_copy(update={"seed": (params.seed + i) % 2**63})

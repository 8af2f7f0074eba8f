"""Which requests an engine accepts, and how many at a time."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from stream_generator.errors import InvalidRequest, QueueFull
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import Request
from stream_generator.sampling_params import SamplingParams

WAITING_CONTEXTS = 16  # the tokens of all prompts that wait, in contexts of the model


@dataclass(frozen=True)
class Intake:
    """The limits of an engine.

    running: requests with a slot, at most. waiting: requests in the queue, at most. has_logprobs:
    whether the runner computes log-probabilities. max_seconds: time limit of each request.
    """

    checkpoint: Checkpoint
    running: int
    waiting: int
    has_logprobs: bool
    max_seconds: float | None

    @property
    def waiting_tokens(self) -> int:
        """How many tokens the waiting prompts may have in all."""
        return WAITING_CONTEXTS * self.checkpoint.context_length

    @property
    def requests(self) -> int:
        """How many requests may wait and run at a time."""
        return self.running + self.waiting

    def new_request(
        self, prompt_ids: Iterable[int], params: SamplingParams, *, request_id: str
    ) -> Request:
        """A request that can be served. Raises `PromptTooLong` or `InvalidRequest`."""
        if params.logprobs is not None and not self.has_logprobs:
            raise InvalidRequest(
                "this model runs one request at a time, without log-probabilities; leave logprobs "
                "out",
                param="logprobs",
            )
        request = self.checkpoint.new_request(prompt_ids, params, request_id=request_id)
        if self.max_seconds is not None:
            request.deadline = request.submitted_at + self.max_seconds
        return request

    def new_requests(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams, n: int, first_id: str
    ) -> list[Request]:
        """`n` requests for each prompt; see `Engine.submit_several`. Raises as `new_request`."""
        requests: list[Request] = []
        for prompt, own in _each(prompts, params, n):
            name = f"{first_id}#{len(requests)}" if requests else first_id
            requests.append(self.new_request(prompt, own, request_id=name))
        self._refuse_too_many(requests)
        return requests

    def _refuse_too_many(self, asked: Collection[Request]) -> None:
        """Raise `InvalidRequest` if even an idle engine could not accept these together."""
        if len(asked) > self.requests:
            raise InvalidRequest(
                f"{len(asked)} replies are more than the {self.requests} that may run and wait "
                "together; ask for fewer",
                param="n",
            )
        tokens = _prompt_tokens(asked)
        if len(asked) > 1 and tokens > self.waiting_tokens:
            raise InvalidRequest(
                f"the prompts have {tokens} tokens in all, and {self.waiting_tokens} may wait; "
                "ask for fewer replies at a time",
                param="n",
            )

    def refuse_if_full(
        self, asked: Collection[Request], waiting: Collection[Request], free_slots: int
    ) -> None:
        """Raise `QueueFull` if the queue has no room for these requests."""
        together = [*waiting, *asked]
        if len(together) > self.waiting + free_slots:
            raise QueueFull(f"{len(waiting)} requests are waiting already; try again in a while")
        # A prompt that would wait alone is accepted, however long it is.
        if (
            waiting
            and len(together) > free_slots
            and _prompt_tokens(together) > self.waiting_tokens
        ):
            raise QueueFull("the waiting prompts are too long in all; try again in a while")


def _prompt_tokens(requests: Collection[Request]) -> int:
    return sum(len(request.prompt_ids) for request in requests)


def _each(
    prompts: Iterable[Iterable[int]], params: SamplingParams, n: int
) -> Iterator[tuple[list[int], SamplingParams]]:
    """Each prompt `n` times; a seed grows by one each time."""
    for prompt in map(list, prompts):
        for i in range(n):
            if params.seed is None:
                yield prompt, params
            else:
                yield prompt, params.model_copy(update={"seed": (params.seed + i) % 2**63})

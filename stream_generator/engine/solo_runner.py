"""Run one request at a time, for models that do not fit the slot cache."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from stream_generator.loop import stream_ids
from stream_generator.request import Choice, Request
from stream_generator.sampling.sampler import Sampled


class SoloRunner:
    """Runs one request at a time through `generate`, with the model's own kind of cache."""

    keeps_prefixes = False
    has_logprobs = False
    smallest_chunk = 1
    reproducible = False

    def __init__(self, model: PreTrainedModel, context_length: int):
        self.slots = 1
        self.context_length = context_length
        self._model = model
        self._steps: Iterator[int] = iter(())
        self._owner: Request | None = None

    def describe(self) -> str:
        return (
            f"transformers' own loop runs one request at a time, with up to {self.context_length} "
            "tokens"
        )

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        self._steps, self._owner = stream_ids(self._model, request), request
        request.num_computed_tokens = len(request.prompt_ids)
        return Choice(next(self._steps))

    def decode(self, requests: list[Request]) -> list[Sampled]:
        return [Choice(next(self._steps))]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Do nothing. The engine never calls this method, because `keeps_prefixes` is false."""

    def release(self, request: Request, *, sound: bool) -> None:
        if request is self._owner:
            self._steps, self._owner = iter(()), None

"""What the engine asks of whatever computes."""

from typing import Protocol

from stream_generator.request import Request
from stream_generator.sampling.sampler import Sampled


class Runner(Protocol):
    """What the engine asks of a runner."""

    slots: int
    context_length: int
    keeps_prefixes: bool  # whether a slot's contents outlive its request
    has_logprobs: bool  # whether it can tell the model's own distribution
    smallest_chunk: int  # ids of a prompt that are computed together, at least
    reproducible: bool  # whether a reply's bits do not depend on the other requests

    def describe(self) -> str:
        """How many requests of what length, and in how much memory, for a person."""

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        """Compute `chunk` more ids of the prompt; the first new id when it is complete."""

    def decode(self, requests: list[Request]) -> list[Sampled]:
        """One new id for each, or the reason why a row alone has none."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot `target` what slot `source` holds of the first `length` positions."""

    def release(self, request: Request, *, sound: bool) -> None:
        """The request has ended; not sound: what it has computed must not be met again."""

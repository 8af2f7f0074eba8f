"""The interface between the engine and everything that computes."""

from typing import Protocol

from stream_generator.request import Request
from stream_generator.sampling.sampler import Sampled


class Runner(Protocol):
    """Computes prompts and replies, each request in its own slot."""

    slots: int
    context_length: int
    keeps_prefixes: bool  # whether a slot keeps its contents after its request has finished
    has_logprobs: bool  # whether the runner computes log-probabilities
    smallest_chunk: int  # the fewest ids of a chunk, unless the whole prompt is shorter
    reproducible: bool  # whether a reply's bits never depend on concurrent requests

    def describe(self) -> str:
        """Describe what runs the model, the number of slots, their length and their memory."""

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        """Run `chunk` more ids of a prompt. After the last, return the first id of the reply."""

    def decode(self, requests: list[Request]) -> list[Sampled]:
        """Return one new id per request, or its error if only this request fails."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` positions to slot `target`."""

    def release(self, request: Request, *, sound: bool) -> None:
        """Release a finished request. If not `sound`, its keys and values may contain NaN."""

"""The reader's end of one request."""

from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from stream_generator.request import FinishReason, QueuePosition, Request, TokenOutput


class TokenStream:
    """What one request gives, as it comes. Iterate it, or `get` with a time-out.

    The engine never waits for a reader: what is not read yet lies in this stream's own queue,
    which a request bounds itself by `max_new_tokens`. Leaving the `with` block, or closing,
    aborts what is not finished.
    """

    def __init__(self, request: Request, abort: Callable[[Request], None]):
        self.request = request
        self._abort = abort
        self._outputs: SimpleQueue[TokenOutput | QueuePosition] = SimpleQueue()
        self._ended = False
        self._told: Callable[[], None] | None = None  # what waits for several streams at once

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def ready(self) -> bool:
        """Whether there is something to get."""
        return not self._outputs.empty()

    def get(self, timeout: float | None = None) -> TokenOutput | QueuePosition | None:
        """The next output, the last of which has a finish reason; None if none came in time.

        timeout: seconds; without one, wait as long as it takes.
        In place of the last output raises why there is none: `GenerationFailed` if computing
        failed, `TimeLimitReached`, or `EngineClosed`.
        """
        try:
            output = self._outputs.get(timeout=timeout)
        except Empty:
            return None
        reason = output.finish_reason if isinstance(output, TokenOutput) else None
        self._ended = reason is not None
        if reason is FinishReason.ERROR:
            assert self.request.error is not None
            raise self.request.error
        return output

    def __iter__(self) -> Iterator[TokenOutput]:
        """The outputs up to the last, without the places in the queue; none, once it was read."""
        while not self._ended:
            output = self.get()
            if isinstance(output, TokenOutput):
                yield output

    def put(self, output: TokenOutput | QueuePosition) -> None:
        """The engine's end."""
        self._outputs.put(output)
        if self._told is not None:
            self._told()

    def tell(self, told: Callable[[], None]) -> None:
        """Call `told`, quickly and from the engine's thread, whenever there is something to get."""
        self._told = told

    def close(self) -> None:
        """Abort the request if it has not finished. Safe from any thread, more than once."""
        self._abort(self.request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def interleaved(
    streams: list[TokenStream], timeout: float | None = None
) -> Iterator[tuple[int, TokenOutput] | None]:
    """The outputs of several streams as they come, each with its stream's number in the list.

    None where nothing came for `timeout` seconds. Raises what `TokenStream.get` does.
    """
    ready: SimpleQueue[int] = SimpleQueue()
    for number, stream in enumerate(streams):
        stream.tell(partial(ready.put, number))
        ready.put(number)  # for what has come before
    left = set(range(len(streams)))
    while left:
        try:
            number = ready.get(timeout=timeout)
        except Empty:
            yield None
            continue
        while (output := streams[number].get(timeout=0)) is not None:
            if isinstance(output, TokenOutput):
                if output.finish_reason is not None:
                    left.discard(number)
                yield number, output

"""The queue from which a reader takes the outputs of its request."""

from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from stream_generator.request import FinishReason, QueuePosition, Request, TokenOutput


class TokenStream:
    """The outputs of one request. Iterate over the stream, or call `get` with a timeout.

    The engine never waits for a reader, because each stream has its own queue. `max_new_tokens`
    limits the length of the queue. `close`, or the end of a `with` block, aborts the request if it
    has not finished.
    """

    def __init__(self, request: Request, abort: Callable[[Request], None]):
        self.request = request
        self._abort = abort
        self._outputs: SimpleQueue[TokenOutput | QueuePosition] = SimpleQueue()
        self._ended = False
        self._callback: Callable[[], None] | None = None  # see `on_output`

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def ready(self) -> bool:
        """Whether an output is in the queue."""
        return not self._outputs.empty()

    def get(self, timeout: float | None = None) -> TokenOutput | QueuePosition | None:
        """Return the next output, or None after `timeout` seconds; by default, wait without limit.

        The last output has a finish reason. If the request fails, raises `GenerationFailed`,
        `TimeLimitReached` or `EngineClosed` instead of the last output.
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
        """Yield the remaining outputs up to the last one, without queue positions."""
        while not self._ended:
            output = self.get()
            if isinstance(output, TokenOutput):
                yield output

    def put(self, output: TokenOutput | QueuePosition) -> None:
        """Append an output to the queue. Only the engine calls this method."""
        self._outputs.put(output)
        if self._callback is not None:
            self._callback()

    def on_output(self, callback: Callable[[], None]) -> None:
        """Call `callback` after each new output. The engine calls `callback` on its own thread, so
        `callback` must return quickly."""
        self._callback = callback

    def close(self) -> None:
        """Abort the request if it has not finished. Any thread may call this repeatedly."""
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
    """Yield the outputs of several streams as they arrive, each with the index of its stream.

    Yields None if no output arrives for `timeout` seconds. Raises the errors of `TokenStream.get`.
    """
    ready: SimpleQueue[int] = SimpleQueue()
    for number, stream in enumerate(streams):
        stream.on_output(partial(ready.put, number))
        ready.put(number)  # the stream may already have outputs
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

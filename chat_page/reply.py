"""One reply, from the question to the figures: the page's way through the service's stream."""

import time
import uuid
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError

from chat_page.conversation import Conversation, Figures, Turn
from chat_page.pace import Batches
from chat_page.tokens import Token
from chat_page.words import Words
from stream_service.client import StreamClient, StreamError

SECONDS_BETWEEN_UPDATES = 0.05  # and as much again for each:
CHARACTERS = 8000
ALTERNATIVES = 5
REPLIES_AT_ONCE = 64  # each holds a thread or two


class Progress(NamedTuple):
    """How far a reply has come. position: in the queue, while it waits; tokens: if asked for."""

    turn: Turn
    position: int | None = None
    tokens: tuple[Token, ...] = ()
    is_last: bool = False


class Replies:
    """The replies that are being written, by ids of our own: so each can be stopped at any time."""

    def __init__(
        self,
        client: StreamClient,
        clock: Callable[[], float] = time.monotonic,
        at_once: int = REPLIES_AT_ONCE,
    ):
        self._client = client
        self._clock = clock
        self._at_once = at_once
        self._open: dict[str, _Open] = {}

    def open(self) -> str:
        """The id of a reply to come."""
        reply_id = uuid.uuid4().hex
        self._open[reply_id] = _Open()
        return reply_id

    def stop(self, reply_id: str | None) -> None:
        """End a reply, wherever it is: even before its question has reached the service.

        Where there is none, or it has ended, nothing happens.
        """
        this = self._open.get(reply_id or "")
        if this is not None:
            # First the mark, then the call: `write` looks for the mark once the service knows it.
            this.is_stopped = True
            self._end(str(reply_id), this)

    def write(
        self,
        reply_id: str,
        conversation: Conversation,
        words: Words,
        *,
        context_length: int | None = None,
        begun: tuple[Token, ...] | None = None,
    ) -> Generator[Progress, None, None]:
        """The reply to `conversation`, longer each time; one that stands at its end is continued.

        begun: the tokens of what is there already, where tokens are asked for. What goes wrong ends
        the reply with a sentence in its `problem`; what had come is kept.
        """
        reply = _Reply(conversation.last_reply, context_length, begun or (), self._clock)
        this = self._open[reply_id]
        params = conversation.settings.params()
        if begun is not None:
            params["logprobs"] = ALTERNATIVES

        def events() -> Generator[dict[str, Any], None, None]:
            stream = self._client.stream(conversation.messages(), request_id=reply_id, **params)
            if this.is_stopped:
                self._end(reply_id, this)
            yield from stream.events()

        this.batches = Batches(events(), reply.pause, self._clock)
        try:
            yield reply.progress()
            if len(self._open) > self._at_once:
                raise StreamError("this page can write no more replies at once", status=429)
            if not this.is_stopped:
                for batch in this.batches:
                    for event in batch:
                        reply.add(event)
                    yield reply.progress()
            if reply.figures.finish_reason is None:
                reply.update(finish_reason="abort")
        except StreamError as error:
            reply.problem = sentence(
                error, words, has_begun=reply.figures.prompt_tokens is not None
            )
        finally:
            # Also where nobody reads on: a visitor who has left.
            del self._open[reply_id]
            if reply.figures.finish_reason is None and reply.problem is None:
                this.batches.end()
                self._end(reply_id, this)
        yield reply.progress()._replace(is_last=True)

    def _end(self, reply_id: str, this: "_Open") -> None:
        try:
            self._client.stop(reply_id)
        except StreamError as error:  # with a status: it has ended, or is not known yet
            if error.status is None and this.batches is not None:
                this.batches.end()  # nobody answers there: nothing more is to be waited for


class _Open:
    """A reply that is being written: what the visitor wants of it, and what comes of it."""

    is_stopped = False
    batches: Batches[dict[str, Any]] | None = None


class _Reply:
    """What the events have told so far."""

    def __init__(
        self,
        before: Turn | None,
        context_length: int | None,
        tokens: tuple[Token, ...],
        clock: Callable[[], float],
    ):
        self.text = before.content if before else ""
        self.figures = Figures(context_length=context_length)
        self.problem: str | None = None
        self._tokens = list(tokens)
        self._position: int | None = None
        self._clock = clock
        self._asked = clock()
        self._first: float | None = None

    def progress(self) -> Progress:
        turn = Turn.model_construct(
            role="assistant", content=self.text, figures=self.figures, problem=self.problem
        )
        return Progress(turn, self._position, tuple(self._tokens))

    def pause(self) -> float:
        """Seconds until the page is written anew: a browser's work grows with the text."""
        return SECONDS_BETWEEN_UPDATES * (1 + len(self.text) / CHARACTERS)

    def update(self, **figures: Any) -> None:
        # The service's word is checked like any other that ends up in the browser.
        with suppress(ValidationError):
            known = self.figures.model_dump() | figures
            self.figures = Figures.model_validate(known)

    def add(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "start":
                self.update(
                    model=event["model"],
                    prompt_tokens=event["prompt_tokens"],
                    trimmed_messages=event["trimmed"]["messages"],
                )
            case "queue":
                self._position = event["position"]
            case "delta":
                self._add_delta(event)
            case "end":
                self._position = None
                self.update(
                    completion_tokens=event["usage"]["completion_tokens"],
                    finish_reason=event["finish_reason"],
                    params=event["params"],
                    **event["timings"],
                )

    def _add_delta(self, event: dict[str, Any]) -> None:
        now = self._clock()
        self._position = None
        self.text += event["delta"]
        if "token" in event:
            self._tokens.append(Token.of(event))
        if self._first is None:
            self._first = now
            self.update(
                cached_tokens=event.get("cached_tokens"), ttft_ms=1000 * (now - self._asked)
            )
        count = (self.figures.completion_tokens or 0) + 1
        rate = (count - 1) / (now - self._first) if now > self._first else None
        # Without validation: this happens for each token, with numbers of our own.
        self.figures = self.figures.model_copy(
            update={"completion_tokens": count, "tokens_per_second": rate}
        )


def sentence(error: StreamError, words: Words, *, has_begun: bool = False) -> str:
    """What went wrong and what to do, for a person."""
    if error.status is None:
        return words("broken") if has_begun else words("away")
    if error.status in (401, 403):
        return words("key")
    if error.status == 429:
        return words("full")
    if error.status == 503:
        return words("loading")
    if error.code == "context_length_exceeded":
        return words("too_long")
    return words("refused", why=str(error))[:2000]

"""Reads one reply from the service, with its text, tokens and figures."""

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

SECONDS_BETWEEN_UPDATES = 0.05  # of an empty reply; doubled at `DOUBLING_CHARACTERS`
DOUBLING_CHARACTERS = 8000
ALTERNATIVES = 5  # per token
REPLIES_AT_ONCE = 64  # each uses one or two threads


class Progress(NamedTuple):
    """The reply so far. position: in the queue, while it waits. tokens: only if requested."""

    turn: Turn
    position: int | None = None
    tokens: tuple[Token, ...] = ()
    is_last: bool = False


class Replies:
    """The replies in progress. The page chooses their ids, and so can stop them at any time."""

    def __init__(
        self,
        client: StreamClient,
        clock: Callable[[], float] = time.monotonic,
        at_once: int = REPLIES_AT_ONCE,
    ):
        self._client = client
        self._clock = clock
        self._at_once = at_once
        self._open: dict[str, _OpenReply] = {}

    def open(self) -> str:
        """Register a new reply and return its id."""
        reply_id = uuid.uuid4().hex
        self._open[reply_id] = _OpenReply()
        return reply_id

    def stop(self, reply_id: str | None) -> None:
        """Stop a reply, even before its request has reached the service.

        Ignores an id that is unknown, or whose reply has ended.
        """
        reply = self._open.get(reply_id or "")
        if reply is not None:
            # Set before the call: `write` checks this after the service has received the request.
            reply.is_stopped = True
            self._abort(str(reply_id), reply)

    def write(
        self,
        reply_id: str,
        conversation: Conversation,
        words: Words,
        *,
        context_length: int | None = None,
        prefix_tokens: tuple[Token, ...] | None = None,
    ) -> Generator[Progress, None, None]:
        """Yield the reply to `conversation` as it grows. If the conversation ends in a reply, that
        reply is continued.

        prefix_tokens: the tokens of the text so far; None to request no tokens. After an error, the
        text so far is kept, and the turn's `problem` explains the error.
        """
        reply = _Reply(conversation.last_reply, context_length, prefix_tokens or (), self._clock)
        control = self._open[reply_id]
        params = conversation.settings.params()
        if prefix_tokens is not None:
            params["logprobs"] = ALTERNATIVES

        def events() -> Generator[dict[str, Any], None, None]:
            stream = self._client.stream(conversation.messages(), request_id=reply_id, **params)
            if control.is_stopped:
                self._abort(reply_id, control)
            yield from stream.events()

        control.batches = Batches(events(), reply.pause, self._clock)
        try:
            yield reply.progress()
            if len(self._open) > self._at_once:
                raise StreamError(f"the page is writing {self._at_once} replies", status=429)
            if not control.is_stopped:
                for batch in control.batches:
                    for event in batch:
                        reply.add(event)
                    yield reply.progress()
            if reply.figures.finish_reason is None:
                reply.update(finish_reason="abort")
        except StreamError as error:
            reply.problem = explain(error, words, has_begun=reply.figures.prompt_tokens is not None)
        finally:
            # This also runs when Gradio closes the generator because the user has left.
            del self._open[reply_id]
            if reply.figures.finish_reason is None and reply.problem is None:
                control.batches.end()
                self._abort(reply_id, control)
        yield reply.progress()._replace(is_last=True)

    def _abort(self, reply_id: str, reply: "_OpenReply") -> None:
        try:
            self._client.stop(reply_id)
        except StreamError as error:
            # With a status, the request has ended or has not arrived yet. Without a status, the
            # service cannot be reached, and no further event will come.
            if error.status is None and reply.batches is not None:
                reply.batches.end()


class _OpenReply:
    """A reply in progress: whether the user has stopped it, and its events."""

    is_stopped = False
    batches: Batches[dict[str, Any]] | None = None


class _Reply:
    """The reply that the events so far add up to."""

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
        """Seconds until the next update: a browser's work per update grows with the text."""
        return SECONDS_BETWEEN_UPDATES * (1 + len(self.text) / DOUBLING_CHARACTERS)

    def update(self, **figures: Any) -> None:
        # Validated like all data that reaches the browser. Invalid figures are ignored.
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
        # Not validated: this runs for every token, and the numbers are computed here.
        self.figures = self.figures.model_copy(
            update={"completion_tokens": count, "tokens_per_second": rate}
        )


def explain(error: StreamError, words: Words, *, has_begun: bool = False) -> str:
    """Tell the user what went wrong and what to do."""
    if error.status is None:
        return words("broken") if has_begun else words("away")
    if error.status == 401:
        return words("key")
    if error.status == 429:
        return words("full")
    if error.status == 503:
        return words("loading")
    if error.code == "context_length_exceeded":
        return words("too_long")
    return words("refused", why=str(error))[:2000]

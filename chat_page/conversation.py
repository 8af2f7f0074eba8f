"""A conversation as plain data.

Conversations come from browsers and files, so all fields are validated and bounded. A method that
changes a conversation returns a changed copy.
"""

import time
import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from chat_page.thinking import split_thinking

MAX_TURNS = 2000
MAX_CHARACTERS = 1_000_000  # per message
NAME_CHARACTERS = 48

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Line = Annotated[str, Field(max_length=2000)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class TooLarge(ValueError):
    """A message has over `MAX_CHARACTERS`, or a conversation over `MAX_TURNS`."""


class Record(BaseModel):
    """Base of all records. Ignores unknown fields, which a newer page may have written."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ChatSettings(Record):
    """The user's settings. None: the service's default. The service checks the bounds."""

    system_prompt: Text = ""
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Count | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_new_tokens: Count | None = None
    max_new_tokens: Count | None = None
    seed: Count | None = None
    stop: Annotated[tuple[Line, ...], Field(max_length=1000)] = ()

    def params(self) -> dict[str, Any]:
        """The sampling parameters to send."""
        chosen = self.model_dump(exclude={"system_prompt"}, exclude_none=True)
        stop = chosen.pop("stop")
        return {**chosen, "stop": list(stop)} if stop else chosen


class Figures(Record):
    """The service's figures for one reply; None if the service has not sent them."""

    model: Line | None = None
    prompt_tokens: Count | None = None
    cached_tokens: Count | None = None
    completion_tokens: Count | None = None
    context_length: Count | None = None
    trimmed_messages: Count = 0
    queue_ms: Number | None = None
    ttft_ms: Number | None = None
    tokens_per_second: Number | None = None
    finish_reason: Annotated[str, Field(max_length=32)] | None = None
    params: Annotated[dict[Line, Any], Field(max_length=64)] = {}


class Turn(Record):
    """One message. A reply also has figures, and a `problem` text if it failed."""

    role: Literal["user", "assistant"]
    content: Text
    figures: Figures | None = None
    problem: Line | None = None

    @property
    def can_go_on(self) -> bool:
        """Whether this is a reply that ended early."""
        reason = self.figures.finish_reason if self.figures else None
        return self.role == "assistant" and bool(self.content) and reason != "stop"


class Conversation(Record):
    """The turns of user and assistant, with a name and settings."""

    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")] = Field(
        default_factory=lambda: uuid.uuid4().hex
    )
    name: Annotated[str, Field(max_length=200)] = ""
    updated: Number = 0.0
    settings: ChatSettings = ChatSettings()
    turns: Annotated[tuple[Turn, ...], Field(max_length=MAX_TURNS)] = ()

    def asked(self, message: str) -> Self:
        """Append a message of the user. The first one names the conversation. Raises `TooLarge`."""
        if len(message) > MAX_CHARACTERS or len(self.turns) + 2 > MAX_TURNS:
            raise TooLarge
        turns = (*self.turns, Turn(role="user", content=message))
        name = self.name or name_of(message)
        return self.model_copy(update={"turns": turns, "name": name, "updated": time.time()})

    def replied(self, turn: Turn) -> Self:
        """Append a reply, or replace the last one."""
        turns = (*self.unanswered().turns, turn)
        return self.model_copy(update={"turns": turns, "updated": time.time()})

    def unanswered(self) -> Self:
        """Remove the last reply."""
        turns = self.turns
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return self.model_copy(update={"turns": turns})

    def undone(self) -> tuple[Self, str]:
        """Remove the last message and its reply; return the message too."""
        turns = self.unanswered().turns
        message = turns[-1].content if turns else ""
        left = self.model_copy(update={"turns": turns[:-1], "updated": time.time()})
        return left, message

    def edited(self, index: int, message: str) -> Self:
        """Replace the message of turn `index` and remove all later turns. Raises `TooLarge`."""
        turns = self.turns[:index]
        named = self.model_copy(update={"turns": turns, "name": self.name if turns else ""})
        return named.asked(message)

    def with_settings(self, settings: ChatSettings) -> Self:
        return self.model_copy(update={"settings": settings})

    @property
    def last_reply(self) -> Turn | None:
        return self.turns[-1] if self.turns and self.turns[-1].role == "assistant" else None

    def messages(self) -> list[dict[str, str]]:
        """The messages to send. Leaves out earlier messages that got no reply, and the thinking in
        earlier replies.

        A reply at the end is sent whole, because the service continues it.
        """
        sent: list[dict[str, str]] = []
        for turn in self.turns[:-1]:
            if turn.role == "user":
                sent.append({"role": "user", "content": turn.content})
            elif turn.content:
                answer = split_thinking(turn.content).answer
                sent.append({"role": "assistant", "content": answer})
            elif sent and sent[-1]["role"] == "user":
                sent.pop()
        sent += [{"role": turn.role, "content": turn.content} for turn in self.turns[-1:]]
        if self.settings.system_prompt.strip():
            sent.insert(0, {"role": "system", "content": self.settings.system_prompt})
        return sent


def name_of(message: str) -> str:
    """The beginning of a message, cut between two words if possible."""
    line = " ".join(message.split())
    if len(line) <= NAME_CHARACTERS:
        return line
    cut = line[:NAME_CHARACTERS]
    return (cut.rsplit(" ", 1)[0] if " " in cut else cut).rstrip(" ,.;:") + "…"

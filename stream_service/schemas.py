"""The fields of all request bodies. No other file reads JSON keys of requests."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stream_generator.sampling_params import SamplingParams
from stream_generator.text.chat import Message

MAX_TURNS = 10_000
MAX_CHARACTERS = 4_000_000  # in one text; --max-body limits the whole body
MAX_IDS = 1_000_000  # in one prompt of ids
MAX_REPLIES = 16  # to one prompt
MAX_PROMPTS = 64  # in one request

BoundedText = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class TextPart(BaseModel):
    """A text part of a message, as OpenAI's clients and Gradio send it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: BoundedText


class ChatMessage(BaseModel):
    """A message of a conversation. The role "developer" is OpenAI's newer name for "system"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: BoundedText | Annotated[list[TextPart], Field(max_length=MAX_TURNS, fail_fast=True)]

    def message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


# JSON has no tuples, so a pair arrives as a list.
Pair = Annotated[tuple[BoundedText, BoundedText], Field(strict=False)]


class SampledRequest(SamplingParams):
    """Sampling parameters in a body, with OpenAI's name for the maximum length."""

    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="same as max_new_tokens")

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters of the body."""
        return _sampling(self, {"max_tokens": self.max_tokens})


class StreamRequest(SampledRequest):
    """The body of `/stream` and `/chat`: a conversation, and sampling parameters."""

    query: str | None = Field(
        None, min_length=1, max_length=MAX_CHARACTERS, description="the user's new message"
    )
    history: list[ChatMessage | Pair] | None = Field(
        None,
        max_length=MAX_TURNS,
        fail_fast=True,
        description="with query: earlier turns, as [user, assistant] pairs or as messages",
    )
    prompt: BoundedText | None = Field(None, description="with query: the system prompt")
    messages: list[ChatMessage] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TURNS,
        fail_fast=True,
        description="the whole conversation, instead of query, history and prompt",
    )
    truncate: bool = Field(
        True, description="leave out the oldest turns if the conversation is too long"
    )

    @model_validator(mode="after")
    def _one_conversation(self) -> Self:
        if (self.query is None) == (self.messages is None):
            raise ValueError("give either query or messages")
        if self.messages is not None:
            for name in ("history", "prompt"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} requires query; move it into messages")
        self.sampling()
        return self

    def conversation(self) -> list[Message]:
        """Return the whole conversation as messages."""
        if self.messages is not None:
            return [turn.message() for turn in self.messages]
        messages: list[Message] = []
        if self.prompt:
            messages.append({"role": "system", "content": self.prompt})
        for turn in self.history or ():
            if isinstance(turn, ChatMessage):
                messages.append(turn.message())
            else:
                messages.append({"role": "user", "content": turn[0]})
                messages.append({"role": "assistant", "content": turn[1]})
        messages.append({"role": "user", "content": self.query or ""})
        return messages

    def history_after(self, response: str) -> list[Any]:
        """Return the conversation with the reply, in the form of the request: pairs or messages."""
        turns = [turn for turn in self.history or () if isinstance(turn, ChatMessage)]
        if self.messages is None and not turns:
            return [*map(list, self.history or ()), [self.query, response]]
        messages = self.conversation()[1 if self.prompt else 0 :]
        if messages[-1]["role"] == "assistant":
            response = messages.pop()["content"] + response
        return [*messages, {"role": "assistant", "content": response}]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = Field(False, description="send a last chunk with the token counts")
    include_obfuscation: Literal[False] = Field(False, description="the service adds no padding")


class OpenAIRequest(SampledRequest):
    """The fields that both OpenAI routes share, with transformers' sampling parameters."""

    null_is_absent: ClassVar = True  # OpenAI's clients send null for an absent field

    model: str | None = Field(None, max_length=512, description="the name of the served model")
    n: int = Field(1, ge=1, le=MAX_REPLIES, description="number of replies to each prompt")
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(OpenAIRequest):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=1_000_000, description="same as max_new_tokens"
    )
    # In OpenAI's chat protocol, logprobs is a switch, and top_logprobs is the number.
    logprobs: bool | None = Field(None, description="return the log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="alternatives for each token")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        self.sampling()
        return self

    def conversation(self) -> list[Message]:
        return [turn.message() for turn in self.messages]

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters of the body."""
        limits = {
            "max_tokens": self.max_tokens,
            "max_completion_tokens": self.max_completion_tokens,
        }
        return _sampling(self, limits, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


# Without fail_fast, the errors for a million ids would take a gigabyte.
Ids = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)
]
Prompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)


class CompletionRequest(OpenAIRequest):
    """The body of `/v1/completions`: texts or ids to continue, without a chat template."""

    prompt: (
        BoundedText | Ids | Annotated[list[BoundedText], Prompts] | Annotated[list[Ids], Prompts]
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        self.sampling()
        return self

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _sampling(
    body: SamplingParams, limits: dict[str, int | None], **changes: Any
) -> SamplingParams:
    """Return the sampling parameters of a body. limits: its other names for `max_new_tokens`.

    Raises `ValueError` if the body has two of these names, or contradictory parameters.
    """
    given = {name: getattr(body, name) for name in SamplingParams.model_fields} | changes
    limits = {"max_new_tokens": body.max_new_tokens} | limits
    named = [name for name, value in reversed(limits.items()) if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} mean the same; give one of them")
    if named:
        given["max_new_tokens"] = limits[named[0]]
    try:
        return SamplingParams(**given)
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ValueError(message.removeprefix("Value error, ")) from None


def sampling_bounds() -> dict[str, dict[str, Any]]:
    """Return the type and bounds of each sampling parameter as JSON schema, for `GET /`."""
    bounds = {}
    for name, schema in SamplingParams.model_json_schema()["properties"].items():
        bounds[name] = types_of(schema)[0]
    return bounds


def types_of(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the types that a field may have, without null."""
    return [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]

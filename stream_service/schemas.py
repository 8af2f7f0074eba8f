"""The bodies of requests: the only place where JSON keys are read."""

import difflib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stream_generator.chat import Message
from stream_generator.errors import InvalidRequest
from stream_generator.sampling_params import SamplingParams

MAX_TURNS = 10_000


class TextPart(BaseModel):
    """A piece of a message's content, as OpenAI's clients and Gradio send it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


# JSON has no tuples: a pair arrives as a list.
Pair = Annotated[tuple[str, str], Field(strict=False)]


class StreamRequest(SamplingParams):
    """The body of `/stream` and `/chat`: a conversation, and how to sample the reply."""

    query: str | None = Field(None, min_length=1, description="the user's new message")
    history: list[Turn | Pair] | None = Field(
        None, max_length=MAX_TURNS, description="earlier turns: [user, assistant] or messages"
    )
    prompt: str | None = Field(None, description="the system prompt")
    messages: list[Turn] | None = Field(
        None,
        min_length=1,
        max_length=MAX_TURNS,
        description="the whole conversation, in place of query, history and prompt",
    )
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="as max_new_tokens")

    @model_validator(mode="after")
    def _one_conversation(self) -> Self:
        if (self.query is None) == (self.messages is None):
            raise ValueError("give either query or messages")
        if self.messages is not None:
            for name in ("history", "prompt"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} goes with query; put it into messages")
        if self.max_tokens is not None and self.max_new_tokens is not None:
            raise ValueError("max_tokens and max_new_tokens mean the same; give one of them")
        return self

    def conversation(self) -> list[Message]:
        """All of it, as messages."""
        if self.messages is not None:
            return [turn.message() for turn in self.messages]
        messages: list[Message] = []
        if self.prompt:
            messages.append({"role": "system", "content": self.prompt})
        for turn in self.history or ():
            if isinstance(turn, Turn):
                messages.append(turn.message())
            else:
                messages.append({"role": "user", "content": turn[0]})
                messages.append({"role": "assistant", "content": turn[1]})
        messages.append({"role": "user", "content": self.query or ""})
        return messages

    def history_after(self, response: str) -> list[Any]:
        """The conversation with the reply, in the form it came in: pairs, or messages."""
        turns = [turn for turn in self.history or () if isinstance(turn, Turn)]
        if self.messages is None and not turns:
            return [*map(list, self.history or ()), [self.query, response]]
        messages = self.conversation()[1 if self.prompt else 0 :]
        if messages[-1]["role"] == "assistant":
            response = messages.pop()["content"] + response
        return [*messages, {"role": "assistant", "content": response}]

    def sampling(self) -> SamplingParams:
        """The sampling parameters alone."""
        given = {name: getattr(self, name) for name in SamplingParams.model_fields}
        if self.max_tokens is not None:
            given["max_new_tokens"] = self.max_tokens
        return SamplingParams(**given)


def parse_stream_request(body: bytes) -> StreamRequest:
    """The request that a JSON body holds. Raises `InvalidRequest`, which names the field."""
    data = _parse_json(body)
    if not isinstance(data, dict):
        raise InvalidRequest('the body must be a JSON object, such as {"query": "Hello"}')
    for key in data:  # before pydantic, which cannot name a key that is not valid Unicode
        if key not in StreamRequest.model_fields:
            raise _unknown(key, key)
    try:
        request = StreamRequest.model_validate(data)
        request.sampling()  # max_tokens may contradict what max_new_tokens did not
    except ValidationError as error:
        raise _explained(error) from None
    return request


def sampling_bounds() -> dict[str, dict[str, Any]]:
    """Each sampling parameter's type and bounds, as JSON schema, for `GET /`."""
    bounds = {}
    for name, schema in SamplingParams.model_json_schema()["properties"].items():
        kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
        bounds[name] = kinds[0]
    return bounds


def _parse_json(body: bytes) -> Any:
    """Strict JSON in UTF-8: what Python's parser lets through beyond it is refused."""
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_duplicates,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("the body must be JSON in UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at character {error.pos}"
        ) from None
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequest("the body holds a number that is too long") from None


def _refuse_constant(name: str) -> Any:
    raise InvalidRequest(f"{name} is not valid JSON; use a finite number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequest(f"{_shown(twice)} is given twice; give it once", param=twice)
    return result


def _explained(error: ValidationError) -> InvalidRequest:
    """pydantic's first complaint, as a sentence that names the field and the remedy."""
    first = error.errors(include_url=False, include_input=False)[0]
    # Locations inside a union also name its branch; a person knows only keys and indices.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part[:1].islower()]
    param = ".".join(path).removesuffix(".str").removesuffix(".[key]") or None
    if first["type"] == "extra_forbidden":
        return _unknown(str(first["loc"][-1]), param)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return InvalidRequest(message, param=_named_first(message))
    return InvalidRequest(f"{param or 'body'}: {message}", param=param)


def _unknown(name: str, param: str | None) -> InvalidRequest:
    known = (
        difflib.get_close_matches(name, StreamRequest.model_fields, n=1) if name == param else ()
    )
    hint = f"; did you mean {known[0]}?" if known else ""
    return InvalidRequest(f"unknown field {_shown(name)}{hint}", param=param)


def _named_first(message: str) -> str | None:
    """The field that a complaint about several fields begins with."""
    word = message.partition(" ")[0]
    return word if word in StreamRequest.model_fields else None


def _shown(name: str) -> str:
    return json.dumps(name if len(name) <= 60 else name[:60] + "...")

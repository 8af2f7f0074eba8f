"""Bytes to a validated body: strict JSON, and errors that name the field and the remedy."""

import difflib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stream_generator.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)

# What OpenAI's protocol or other services know and this one does not do: refused by name.
NOT_SUPPORTED = frozenset((
    "audio", "best_of", "echo", "function_call", "functions", "guided_json", "guided_regex",
    "metadata", "modalities", "parallel_tool_calls", "prediction", "prompt_cache_key",
    "reasoning_effort", "response_format", "safety_identifier", "service_tier", "store", "suffix",
    "tool_choice", "tools", "user", "verbosity", "web_search_options",
))  # fmt: skip


def parse_body(body: bytes, model: type[Body]) -> Body:
    """The `model` that a JSON body holds. Raises `InvalidRequest`, which names the field."""
    data = _parse_json(body)
    if not isinstance(data, dict):
        raise InvalidRequest('the body must be a JSON object, such as {"query": "Hello"}')
    for key in data:  # before pydantic, which cannot name a key that is not valid Unicode
        if key not in model.model_fields:
            raise _unknown(key, key, model)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explained(error, model) from None


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


def _explained(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """pydantic's first complaint, as a sentence that names the field and the remedy."""
    first = error.errors(include_url=False, include_input=False)[0]
    # Locations inside a union also name its branch; a person knows only keys and indices.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or part[:1].islower()]
    path = [part for part in path if "[" not in part]
    param = ".".join(path).removesuffix(".str") or None
    if first["type"] == "extra_forbidden":
        return _unknown(str(first["loc"][-1]), param, model)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return InvalidRequest(message, param=_named_first(message, model))
    return InvalidRequest(f"{param or 'body'}: {message}", param=param)


def _unknown(name: str, param: str | None, model: type[BaseModel]) -> InvalidRequest:
    if name in NOT_SUPPORTED:
        return InvalidRequest(f"{name} is not supported here; leave it out", param=param)
    known = difflib.get_close_matches(name, model.model_fields, n=1) if name == param else ()
    hint = f"; did you mean {known[0]}?" if known else ""
    return InvalidRequest(f"unknown field {_shown(name)}{hint}", param=param)


def _named_first(message: str, model: type[BaseModel]) -> str | None:
    """The field that a complaint about several fields begins with."""
    word = message.partition(" ")[0]
    return word if word in model.model_fields else None


def _shown(name: str) -> str:
    return json.dumps(name if len(name) <= 60 else name[:60] + "...")

"""Parses request bodies: strict JSON, and errors that name the field and the remedy."""

import difflib
import functools
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stream_generator.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)

MAX_NAME = 60  # characters of a field's name in an error

# pydantic's names for the branches of a union: "str", "constrained-str", "list[...]", "TextPart".
_BRANCH = re.compile(r"^(str|int|[A-Z]\w*)$|[-\[]")

# Fields of OpenAI's protocol or of other services that this service rejects by name.
NOT_SUPPORTED = frozenset((
    "audio", "best_of", "echo", "function_call", "functions", "guided_json", "guided_regex",
    "metadata", "modalities", "parallel_tool_calls", "prediction", "prompt_cache_key",
    "reasoning_effort", "response_format", "safety_identifier", "service_tier", "store", "suffix",
    "tool_choice", "tools", "user", "verbosity", "web_search_options",
))  # fmt: skip


def parse_body(body: bytes, model: type[Body]) -> Body:
    """Parse a JSON body into an instance of the pydantic class `model`. Raises `InvalidRequest`,
    which names the field."""
    data = _parse_json(body)
    if not isinstance(data, dict):
        raise InvalidRequest('the body must be a JSON object, such as {"query": "Hello"}')
    if getattr(model, "null_is_absent", False):
        data = _without_nulls(data)
    for key in data:  # here, because pydantic cannot name a key that is not valid Unicode
        if key not in model.model_fields:
            raise _unknown_field(key, key, model)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _invalid_request(error, model) from None


def _parse_json(body: bytes) -> Any:
    """Parse strict JSON in UTF-8. Rejects the extensions of JSON that Python's parser accepts."""
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_constant=_reject_constant,
            object_pairs_hook=_reject_duplicates,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8; send JSON in UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply; use fewer levels") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at character {error.pos}"
        ) from None
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequest("a number in the body is too long; use fewer digits") from None


def _without_nulls(value: Any) -> Any:
    """Return `value` without the keys whose value is null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _reject_constant(name: str) -> Any:
    raise InvalidRequest(f"{name} is not valid JSON; use a finite number")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InvalidRequest(f"the field {_shown(key)} is given twice; give it once", param=key)
        result[key] = value
    return result


def _invalid_request(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """Turn pydantic's first error into a sentence that names the field and the remedy."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Each branch of a union has errors. The deepest error is in the branch that the client meant.
    of_first = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    first = max(of_first, key=lambda e: [len(e["loc"]), *(p for p in e["loc"] if type(p) is int)])
    # Remove the branches of unions from the location: the client knows only keys and indices.
    path = [str(p) for p in first["loc"] if isinstance(p, int) or not _BRANCH.search(p)]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return _unknown_field(str(first["loc"][-1]), param, model)
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("Tuple should", "a list should").replace(" after validation", "")
    if first["type"] == "value_error":
        return InvalidRequest(message, param=_named_first(message, model))
    return InvalidRequest(f"{param or 'body'}: {message}", param=param)


def _unknown_field(name: str, param: str | None, model: type[BaseModel]) -> InvalidRequest:
    if name in NOT_SUPPORTED:
        return InvalidRequest(f"the field {name} is not supported; leave it out", param=param)
    known: list[str] = []
    if len(name) <= MAX_NAME:
        names = model.model_fields if name == param else _nested_names(model)
        known = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {known[0]}?" if known else ""
    return InvalidRequest(f"unknown field {_shown(name)}{hint}", param=param)


@functools.cache
def _nested_names(model: type[BaseModel]) -> frozenset[str]:
    """Collect the fields of the objects in a body: messages, their parts, options."""
    inner = model.model_json_schema().get("$defs", {}).values()
    return frozenset(name for schema in inner for name in schema.get("properties", ()))


def _named_first(message: str, model: type[BaseModel]) -> str | None:
    """Return the field with which an error about several fields begins."""
    word = message.partition(" ")[0]
    return word if word in model.model_fields else None


def _shown(name: str) -> str:
    return json.dumps(name if len(name) <= MAX_NAME else name[:MAX_NAME] + "...")

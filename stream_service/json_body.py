"""Bytes to a validated body: strict JSON, and errors that name the field and the remedy."""

import difflib
import functools
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stream_generator.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)

LONGEST_NAME = 60  # of a field, in an error

# How pydantic names the branch of a union: "str", "constrained-str", "list[...]", "TextPart".
_BRANCH = re.compile(r"^(str|int|[A-Z]\w*)$|[-\[]")

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
    if getattr(model, "null_is_absent", False):
        data = _without_nulls(data)
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


def _without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, however deep."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _refuse_constant(name: str) -> Any:
    raise InvalidRequest(f"{name} is not valid JSON; use a finite number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InvalidRequest(f"{_shown(key)} is given twice; give it once", param=key)
        result[key] = value
    return result


def _explained(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """pydantic's first complaint, as a sentence that names the field and the remedy."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    # Each branch of a union complains: the one that got furthest is the one that was meant.
    of_first = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    first = max(of_first, key=lambda e: [len(e["loc"]), *(p for p in e["loc"] if type(p) is int)])
    # Locations inside a union also name its branch; a person knows only keys and indices.
    path = [str(p) for p in first["loc"] if isinstance(p, int) or not _BRANCH.search(p)]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return _unknown(str(first["loc"][-1]), param, model)
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("Tuple should", "a list should").replace(" after validation", "")
    if first["type"] == "value_error":
        return InvalidRequest(message, param=_named_first(message, model))
    return InvalidRequest(f"{param or 'body'}: {message}", param=param)


def _unknown(name: str, param: str | None, model: type[BaseModel]) -> InvalidRequest:
    if name in NOT_SUPPORTED:
        return InvalidRequest(f"{name} is not supported here; leave it out", param=param)
    known: list[str] = []
    if len(name) <= LONGEST_NAME:
        names = model.model_fields if name == param else _nested_names(model)
        known = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {known[0]}?" if known else ""
    return InvalidRequest(f"unknown field {_shown(name)}{hint}", param=param)


@functools.cache
def _nested_names(model: type[BaseModel]) -> frozenset[str]:
    """The fields of all that a body holds: messages, their parts, options."""
    inner = model.model_json_schema().get("$defs", {}).values()
    return frozenset(name for schema in inner for name in schema.get("properties", ()))


def _named_first(message: str, model: type[BaseModel]) -> str | None:
    """The field that a complaint about several fields begins with."""
    word = message.partition(" ")[0]
    return word if word in model.model_fields else None


def _shown(name: str) -> str:
    return json.dumps(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "...")

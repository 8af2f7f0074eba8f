"""The status codes and error bodies of exceptions."""

import json
from typing import Any

from stream_generator.errors import (
    DuplicateRequest,
    EngineClosed,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StreamGeneratorError,
    TimeLimitReached,
)


class ModelNotFound(InvalidRequest):
    """The request names a model that this service does not serve."""


MAX_MESSAGE, MAX_PARAM = 1000, 200  # bytes of JSON, so that an error body stays under 2 KB

# Status, type and code of each exception class, or of its nearest listed base class.
_ANSWERS: dict[type[BaseException], tuple[int, str, str]] = {
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    PromptTooLong: (400, "invalid_request_error", "context_length_exceeded"),
    InvalidRequest: (400, "invalid_request_error", "invalid_value"),
    DuplicateRequest: (409, "invalid_request_error", "duplicate_request_id"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    TimeLimitReached: (503, "server_error", "time_limit"),
    EngineClosed: (503, "server_error", "unavailable"),
    GenerationFailed: (500, "server_error", "generation_failed"),
    StreamGeneratorError: (500, "server_error", "internal_error"),
}

_HTTP_TYPES = {401: "authentication_error", 403: "permission_error"}
_HTTP_CODES = {
    401: "invalid_api_key",
    403: "not_allowed",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    413: "body_too_large",
    415: "unsupported_media_type",
    503: "unavailable",
}


def answer(error: StreamGeneratorError, request_id: str) -> tuple[dict[str, Any], int]:
    """Return the error body and status code of an exception of this project."""
    kind = next(base for base in type(error).__mro__ if base in _ANSWERS)
    status, type_, code = _ANSWERS[kind]
    param = getattr(error, "param", None)
    return error_body(str(error), type_, param, code, request_id), status


def http_answer(status: int, message: str, request_id: str) -> tuple[dict[str, Any], int]:
    """Return the error body and status code of any other error."""
    type_ = "server_error" if status >= 500 else _HTTP_TYPES.get(status, "invalid_request_error")
    code = _HTTP_CODES.get(status, "internal_error" if status >= 500 else "invalid_request")
    return error_body(message, type_, None, code, request_id), status


def error_body(
    message: str, type_: str, param: str | None, code: str, request_id: str
) -> dict[str, Any]:
    """Return `{"error": {...}}`, the form of every error on every route and in every stream."""
    return {
        "error": {
            "message": _shortened(message, MAX_MESSAGE),
            "type": type_,
            "param": _shortened(param, MAX_PARAM) if param else None,
            "code": code,
            "request_id": request_id,
        }
    }


def _shortened(text: str, limit: int) -> str:
    """Cut `text` to at most `limit` bytes of JSON, in which one character may take 12 bytes."""
    if len(json.dumps(text)) - 2 <= limit:
        return text
    end = limit - 3
    while len(json.dumps(text[:end])) - 2 > limit - 3:
        end = end * 3 // 4
    return text[:end] + "..."

"""Steps that the routes share: admission, the body, and the streamed answer."""

from collections.abc import Iterator

from flask import Response, current_app, g, request
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from stream_service.dispatch import Admission, Dispatcher
from stream_service.json_body import Body, parse_body
from stream_service.wire import Form


def dispatcher() -> Dispatcher:
    """Return the dispatcher of the current application."""
    found: Dispatcher = current_app.extensions["dispatcher"]
    return found


def admit() -> Admission:
    """Admit the current request before its body is read. It stays open until its answer closes."""
    gone = request.environ.get("waitress.client_disconnected")
    g.admission = admission = dispatcher().admit(g.request_id, gone)
    return admission


def read_body(model: type[Body]) -> Body:
    """Read the request's body. Raises `InvalidRequest`, or the HTTP error for its type or size."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("send the body as JSON, with Content-Type: application/json")
    try:
        data = request.get_data()
    except RequestEntityTooLarge:
        limit = current_app.config["MAX_CONTENT_LENGTH"]
        raise RequestEntityTooLarge(
            f"the body is larger than {limit} bytes; shorten the conversation"
        ) from None
    return parse_body(data, model)


def streamed(chunks: Iterator[bytes], form: Form) -> Response:
    """Create an answer that is sent chunk by chunk."""
    return Response(chunks, content_type=f"{form.content_type}; charset=utf-8")

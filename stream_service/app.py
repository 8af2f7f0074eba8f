"""The Flask application: the native routes."""

import re
import uuid
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import (
    HTTPException,
    NotAcceptable,
    RequestEntityTooLarge,
    UnsupportedMediaType,
)

from stream_generator.chat import Prompt
from stream_generator.checkpoint import Checkpoint
from stream_generator.engine import Engine
from stream_generator.errors import StreamGeneratorError
from stream_generator.sampling_params import SamplingParams
from stream_generator.token_stream import TokenStream
from stream_service import wire
from stream_service.disconnect import DisconnectWatcher
from stream_service.errors import answer, http_answer
from stream_service.schemas import StreamRequest, parse_stream_request, sampling_bounds

MAX_BODY_BYTES = 4 * 1024 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def create_app(engine: Engine) -> Flask:
    """The service as a WSGI application, on an engine that has been started."""
    app = Flask("stream_service", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    # In the order of the protocol. (The attribute is of the default provider.)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    watcher = DisconnectWatcher()
    checkpoint = engine.checkpoint

    @app.before_request
    def name_request() -> None:
        sent = request.headers.get("X-Request-Id", "")
        g.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex

    @app.after_request
    def set_headers(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold tokens back
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.errorhandler(StreamGeneratorError)
    def own_error(error: StreamGeneratorError) -> tuple[Response, int]:
        body, status = answer(error, g.request_id)
        return jsonify(body), status

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> tuple[Response, int]:
        body, status = http_answer(error.code or 500, error.description or "", g.request_id)
        return jsonify(body), status

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> tuple[Response, int]:
        app.logger.exception("request %s failed", g.request_id, exc_info=error)
        body, status = http_answer(500, "internal error; the log has the details", g.request_id)
        return jsonify(body), status

    @app.get("/")
    def index() -> Response:
        return jsonify(
            message="started",
            success=True,
            model=checkpoint.name,
            context_length=checkpoint.context_length,
            defaults=_defaults(checkpoint),
            bounds=sampling_bounds(),
            forms=list(wire.FORMS),
        )

    @app.get("/health")
    def health() -> tuple[Response, int]:
        return jsonify(status="ok" if engine.healthy else "failed"), 200 if engine.healthy else 503

    @app.post("/clear")
    def clear() -> Response:
        engine.clear()
        return jsonify(success=True)

    @app.post("/stream")
    def stream() -> Response:
        form = _accepted_form()
        body = _read_body()
        prompt = _prompt(engine, body)
        tokens = engine.submit(prompt.ids, body.sampling(), g.request_id)
        events = wire.events(tokens, checkpoint.name, prompt, body.history_after)
        release = _watch(watcher, tokens)
        try:
            if form is wire.TEXT:
                # No event can tell a failure here, so the status waits for the first token.
                events = _from_first_token(events, tokens)
        except BaseException:
            release()
            raise
        response = Response(
            _encoded(events, form), content_type=f"{form.content_type}; charset=utf-8"
        )
        response.call_on_close(release)
        return response

    @app.post("/chat")
    def chat() -> Response:
        body = _read_body()
        prompt = _prompt(engine, body)
        tokens = engine.submit(prompt.ids, body.sampling(), g.request_id)
        release = _watch(watcher, tokens)
        try:
            for _ in tokens:
                pass
        finally:
            release()
        return jsonify(query=body.query, **wire.reply(tokens.sequence, body.history_after))

    return app


def _defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a request that names no sampling parameter gets."""
    filled = SamplingParams().resolved(checkpoint.defaults, room=checkpoint.context_length, seed=0)
    return filled.model_dump(exclude_none=True, exclude={"seed"})


def _accepted_form() -> wire.Form:
    """The form of the answer that the client asked for; plain text where it has no wish."""
    wanted = request.accept_mimetypes
    best = wanted.best_match(list(wire.FORMS)) if wanted else wire.TEXT.content_type
    if best is None:
        raise NotAcceptable(f"Accept must allow one of: {', '.join(wire.FORMS)}")
    return wire.FORMS[best]


def _read_body() -> StreamRequest:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("send the body as JSON with Content-Type: application/json")
    try:
        body = request.get_data()
    except RequestEntityTooLarge:
        raise RequestEntityTooLarge(
            f"the body is larger than {MAX_BODY_BYTES} bytes; shorten the conversation"
        ) from None
    return parse_stream_request(body)


def _prompt(engine: Engine, body: StreamRequest) -> Prompt:
    checkpoint = engine.checkpoint
    return checkpoint.chat.fit(body.conversation(), checkpoint.context_length)


def _watch(watcher: DisconnectWatcher, tokens: TokenStream) -> Callable[[], None]:
    """End the request when its client leaves; returns what ends both, at the latest on close."""
    gone = request.environ.get("waitress.client_disconnected")
    unwatch = watcher.watch(gone, tokens.close) if gone is not None else _nothing

    def release() -> None:
        unwatch()
        tokens.close()

    return release


def _nothing() -> None:
    pass


def _from_first_token(
    events: Iterator[wire.Event | None], tokens: TokenStream
) -> Iterator[wire.Event | None]:
    """Wait until there is a token, or the reason why there is none, which is raised."""
    for event in events:
        if event is None:
            continue
        if event["event"] == "error":
            assert tokens.sequence.error is not None
            raise tokens.sequence.error
        if event["event"] in ("delta", "end"):
            return chain([event], events)
    raise AssertionError("a stream of events ends with 'end' or 'error'")


def _encoded(events: Iterator[wire.Event | None], form: wire.Form) -> Iterator[bytes]:
    """Nothing is gathered: what an event gives is sent before the next one is looked at."""
    for event in events:
        data: Any = form.heartbeat if event is None else form.encode(event)
        if data:
            yield data

"""The Flask application: the native routes, and what holds for all of them."""

import re
import time
import uuid
from collections.abc import Iterator
from itertools import chain
from typing import Any

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, NotAcceptable, NotFound

from stream_generator.chat import Prompt
from stream_generator.checkpoint import Checkpoint
from stream_generator.engine import Engine
from stream_generator.errors import StreamGeneratorError
from stream_generator.sampling_params import SamplingParams
from stream_generator.token_stream import TokenStream
from stream_service import openai_api, openapi, wire
from stream_service.dispatch import Dispatcher
from stream_service.errors import answer, http_answer
from stream_service.exchange import admit, dispatcher, read_body, streamed
from stream_service.guard import install_guard
from stream_service.metrics import Metrics
from stream_service.openapi import describes
from stream_service.schemas import StreamRequest, sampling_bounds
from stream_service.settings import Settings

VERSION = "0.1.0"
FEATURES = ("stream", "chat", "stop", "logprobs", "openai", "prefix_cache")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def create_app(
    engine: Engine, settings: Settings | None = None, *, tokens_per_second: float | None = None
) -> Flask:
    """The service as a WSGI application, on an engine that has been started.

    tokens_per_second: of one stream, where that has been measured.
    """
    settings = settings or Settings()
    app = Flask("stream_service", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body
    # In the order of the protocol. (The attribute is of the default provider.)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["dispatcher"] = Dispatcher(engine)
    _install_frame(app, Metrics(engine), settings)
    _add_routes(app, engine, tokens_per_second)
    app.register_blueprint(openai_api.create_blueprint(engine.checkpoint))
    return app


def _install_frame(app: Flask, metrics: Metrics, settings: Settings) -> None:
    """What holds for every route: names, refusals, headers, errors, the log."""

    @app.before_request
    def name_request() -> None:
        g.began = time.monotonic()
        sent = request.headers.get("X-Request-Id", "")
        g.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex

    install_guard(app, settings)

    @app.after_request
    def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold tokens back
        response.headers["X-Content-Type-Options"] = "nosniff"
        admission = g.get("admission")
        request_id, began, status = g.request_id, g.began, response.status_code
        rule = request.url_rule.rule if request.url_rule else "none"

        def close() -> None:
            streams = admission.streams if admission else []
            if admission:
                admission.release()
            sequences = [stream.sequence for stream in streams]
            metrics.answered(
                request_id, rule, status, began, sequences, admission.n if admission else 1
            )

        response.call_on_close(close)
        return response

    @app.errorhandler(StreamGeneratorError)
    def own_error(error: StreamGeneratorError) -> Response:
        body, status = answer(error, g.request_id)
        response = jsonify(body)
        response.status_code = status
        if status in (429, 503):
            response.headers["Retry-After"] = str(dispatcher().retry_after())
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        body, status = http_answer(error.code or 500, error.description or "", g.request_id)
        response = jsonify(body)
        response.status_code = status
        for name, value in error.get_headers():
            if name in ("WWW-Authenticate", "Allow"):
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> tuple[Response, int]:
        app.logger.error("request %s failed", g.request_id, exc_info=error)
        body, status = http_answer(500, "internal error; the log has the details", g.request_id)
        return jsonify(body), status

    @app.get("/metrics")
    @describes(answers=("text/plain",))
    def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.exposition(), content_type="text/plain; version=0.0.4")


def _add_routes(app: Flask, engine: Engine, tokens_per_second: float | None) -> None:
    checkpoint = engine.checkpoint

    @app.get("/")
    def index() -> Response:
        """The model, its context, its defaults and the bounds of each parameter."""
        return jsonify(
            message="started",
            success=True,
            version=VERSION,
            model=checkpoint.name,
            context_length=checkpoint.context_length,
            max_concurrent=engine.max_running,
            max_queue=engine.max_waiting,
            tokens_per_second=tokens_per_second and round(tokens_per_second, 1),
            defaults=_defaults(checkpoint),
            bounds=sampling_bounds(),
            forms=list(wire.FORMS),
            features=list(FEATURES),
        )

    @app.get("/health")
    def health() -> tuple[Response, int]:
        """Whether the process lives."""
        return jsonify(status="ok" if engine.healthy else "failed"), 200 if engine.healthy else 503

    @app.get("/ready")
    def ready() -> tuple[Response, int]:
        """Whether a request that is sent now will be served."""
        if engine.accepting:
            return jsonify(status="ready"), 200
        message = "shutting down" if engine.healthy else "the engine has failed, or hangs"
        body, status = http_answer(503, message, g.request_id)
        return jsonify(body), status

    @app.get("/openapi.json")
    def description() -> Response:
        """This protocol, for programs."""
        return jsonify(openapi.document(app, VERSION))

    @app.get("/docs")
    @describes(answers=("text/html",))
    def documentation() -> Response:
        """This protocol, for people."""
        response = Response(openapi.page(app, VERSION), content_type="text/html; charset=utf-8")
        response.headers["Content-Security-Policy"] = PAGE_POLICY
        return response

    @app.post("/clear")
    def clear() -> Response:
        """Forget computed prefixes, and give cached device memory back."""
        engine.clear()
        return jsonify(success=True)

    @app.post("/stop/<request_id>")
    def stop(request_id: str) -> Response:
        """End a request, queued or running; tells what it has given so far."""
        admission = dispatcher().stop(request_id)
        if admission is None:
            raise NotFound("no request with this id is open; it may have ended already")
        sequences = [stream.sequence for stream in admission.streams]
        return jsonify(
            id=request_id,
            response=sequences[0].text if sequences else "",
            responses=[sequence.text for sequence in sequences],
            finish_reason=sequences[0].finish_reason if sequences else "abort",
            usage=wire.usage(sequences, admission.n),
        )

    @app.post("/stream")
    @describes(body=StreamRequest, answers=tuple(wire.FORMS))
    def stream() -> Response:
        """The reply, token by token, as plain text, NDJSON or server-sent events (see Accept)."""
        form = _accepted_form()
        admission = admit()
        body = read_body(StreamRequest)
        prompt = _prompt(checkpoint, body)
        tokens = admission.submit([prompt.ids], body.sampling())[0]
        events = wire.events(tokens, checkpoint, prompt, body.history_after)
        if form is wire.TEXT:
            # No event can tell a failure here, so the status waits for the first token.
            events = _from_first_token(events, tokens)
        return streamed(_encoded(events, form), form)

    @app.post("/chat")
    @describes(body=StreamRequest)
    def chat() -> Response:
        """The reply in one object, when it is complete."""
        admission = admit()
        body = read_body(StreamRequest)
        tokens = admission.submit([_prompt(checkpoint, body).ids], body.sampling())[0]
        for _ in tokens:
            pass
        return jsonify(query=body.query, **wire.reply(tokens.sequence, body.history_after))


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


def _prompt(checkpoint: Checkpoint, body: StreamRequest) -> Prompt:
    if not body.truncate:
        return Prompt(checkpoint.chat.encode(body.conversation()))
    return checkpoint.chat.fit(body.conversation(), checkpoint.context_length)


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

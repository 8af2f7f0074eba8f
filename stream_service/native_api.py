"""The routes of the service's own protocol: `/stream`, `/chat`, `/stop` and the rest."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from flask import Blueprint, Response, current_app, g, jsonify, request
from werkzeug.exceptions import NotAcceptable, NotFound

from stream_generator.engine.token_stream import TokenStream
from stream_generator.loaded_model import Checkpoint
from stream_generator.sampling_params import SamplingParams
from stream_generator.text.chat import Prompt
from stream_service import __version__, openapi, wire
from stream_service.errors import http_answer
from stream_service.exchange import admit, dispatcher, read_body, streamed
from stream_service.metrics import Metrics
from stream_service.openapi import describes
from stream_service.schemas import StreamRequest, sampling_bounds

FEATURES = ("stream", "chat", "stop", "logprobs", "openai", "prefix_cache")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

routes = Blueprint("native", __name__)


@routes.get("/")
def index() -> Response:
    """Describe the service: the model, its context, default parameters and their bounds."""
    engine, speed = dispatcher().engine, current_app.config["TOKENS_PER_SECOND"]
    checkpoint = engine.checkpoint
    return jsonify(
        message="started",
        success=True,
        version=__version__,
        model=checkpoint.name,
        context_length=checkpoint.context_length,
        max_concurrent=engine.intake.running,
        reproducible=engine.reproducible,
        max_queue=engine.intake.waiting,
        tokens_per_second=speed and round(speed, 1),
        defaults=_defaults(checkpoint),
        bounds=sampling_bounds(),
        forms=list(wire.FORMS),
        features=list(FEATURES),
    )


@routes.get("/health")
def health() -> tuple[Response, int]:
    """Status 503 if the engine has failed or hangs, else 200."""
    life = dispatcher().engine.life
    return (jsonify(status="ok"), 200) if life.is_healthy else (jsonify(status="failed"), 503)


@routes.get("/ready")
def ready() -> tuple[Response, int]:
    """Status 200 if the service will serve a request that is sent now, else 503."""
    life = dispatcher().engine.life
    if life.is_accepting:
        return jsonify(status="ready"), 200
    message = "the engine has failed or hangs; restart the service"
    if life.is_healthy:
        message = "the service is shutting down; try again later"
    body, status = http_answer(503, message, g.request_id)
    return jsonify(body), status


@routes.get("/openapi.json")
def description() -> Response:
    """The OpenAPI document of all routes."""
    return jsonify(openapi.document(current_app, __version__))


@routes.get("/docs")
@describes(answers=("text/html",))
def documentation() -> Response:
    """A page that documents all routes."""
    response = Response(
        openapi.page(current_app, __version__), content_type="text/html; charset=utf-8"
    )
    response.headers["Content-Security-Policy"] = PAGE_POLICY
    return response


@routes.get("/metrics")
@describes(answers=("text/plain",))
def prometheus() -> Response:
    """Figures for Prometheus, in its text format."""
    metrics: Metrics = current_app.extensions["metrics"]
    return Response(metrics.exposition(), content_type="text/plain; version=0.0.4")


@routes.post("/clear")
def clear() -> Response:
    """Drop all cached prefixes, and release cached device memory."""
    dispatcher().engine.clear()
    return jsonify(success=True)


@routes.post("/stop/<request_id>")
def stop(request_id: str) -> Response:
    """Abort a waiting or running request, and return its text so far."""
    admission = dispatcher().abort(request_id)
    if admission is None:
        raise NotFound(f"no request with the id {request_id} is open; it may have finished")
    replies = [stream.request for stream in admission.streams]
    return jsonify(
        id=request_id,
        response=replies[0].text if replies else "",
        responses=[reply.text for reply in replies],
        finish_reason=replies[0].finish_reason if replies else "abort",
        usage=wire.usage(replies, admission.n),
    )


@routes.post("/stream")
@describes(body=StreamRequest, answers=tuple(wire.FORMS))
def stream() -> Response:
    """Stream the reply token by token, as plain text, NDJSON or server-sent events (see Accept)."""
    checkpoint = dispatcher().engine.checkpoint
    form = _accepted_form()
    admission = admit()
    body = read_body(StreamRequest)
    prompt = _prompt(checkpoint, body)
    tokens = admission.submit([prompt.ids], body.sampling())[0]
    events = wire.events(tokens, checkpoint, prompt, body.history_after)
    if form is wire.TEXT:
        # Plain text has no error event, so the status waits for the first token.
        events = _from_first_token(events, tokens)
    return streamed(_encoded(events, form), form)


@routes.post("/chat")
@describes(body=StreamRequest)
def chat() -> Response:
    """Return the complete reply as one object."""
    checkpoint = dispatcher().engine.checkpoint
    admission = admit()
    body = read_body(StreamRequest)
    tokens = admission.submit([_prompt(checkpoint, body).ids], body.sampling())[0]
    for _ in tokens:
        pass
    return jsonify(query=body.query, **wire.reply(tokens.request, body.history_after))


def _defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sampling parameters of a request that names none."""
    filled = SamplingParams().resolved(checkpoint.defaults, room=checkpoint.context_length, seed=0)
    return filled.model_dump(exclude_none=True, exclude={"seed"})


def _accepted_form() -> wire.Form:
    """Return the form that the Accept header selects; plain text without this header."""
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
    """Wait for the first token, and return the events from there. Raises if the request fails."""
    for event in events:
        if event is None:
            continue
        if event["event"] == "error":
            assert tokens.request.error is not None
            raise tokens.request.error
        if event["event"] in ("delta", "end"):
            return chain([event], events)
    raise AssertionError("a stream of events ends with 'end' or 'error'")


def _encoded(events: Iterator[wire.Event | None], form: wire.Form) -> Iterator[bytes]:
    """Encode each event before the next one is read, so that nothing is buffered."""
    for event in events:
        data: Any = form.heartbeat if event is None else form.encode(event)
        if data:
            yield data

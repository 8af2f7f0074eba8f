"""Creates the Flask application: its routes, headers, log lines and errors."""

import re
import time
import uuid

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException

from stream_generator.engine.engine import Engine
from stream_generator.errors import StreamGeneratorError
from stream_service import native_api, openai_api
from stream_service.dispatch import Dispatcher
from stream_service.errors import answer, http_answer
from stream_service.exchange import dispatcher
from stream_service.guard import install_guard
from stream_service.metrics import Metrics
from stream_service.settings import ServiceSettings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def create_app(
    engine: Engine,
    settings: ServiceSettings | None = None,
    *,
    tokens_per_second: float | None = None,
) -> Flask:
    """Create the WSGI application that serves `engine`.

    tokens_per_second: the measured speed of one stream, for `GET /`.
    """
    settings = settings or ServiceSettings()
    app = Flask("stream_service", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body
    # Keep the documented order of fields. Only the default JSON provider has this attribute.
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config["TOKENS_PER_SECOND"] = tokens_per_second
    app.extensions["dispatcher"] = Dispatcher(engine)
    app.extensions["metrics"] = metrics = Metrics(engine)
    _install_hooks(app, metrics)
    install_guard(app, settings)
    _install_errors(app)
    app.register_blueprint(native_api.routes)
    app.register_blueprint(openai_api.create_blueprint(engine.checkpoint))
    return app


def _install_hooks(app: Flask, metrics: Metrics) -> None:
    """Give each request an id, set the headers of its answer, and record the closed answer."""

    @app.before_request
    def name_request() -> None:
        g.began = time.monotonic()
        sent = request.headers.get("X-Request-Id", "")
        g.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex

    @app.after_request
    def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Accel-Buffering"] = "no"  # nginx must not buffer tokens
        response.headers["X-Content-Type-Options"] = "nosniff"
        admission = g.get("admission")
        request_id, began, status = g.request_id, g.began, response.status_code
        rule = request.url_rule.rule if request.url_rule else "none"

        def close() -> None:
            streams = admission.streams if admission else []
            if admission:
                admission.release()
            replies = [stream.request for stream in streams]
            n = admission.n if admission else 1
            metrics.record(request_id, rule, status, began, replies, n)

        response.call_on_close(close)
        return response


def _install_errors(app: Flask) -> None:
    """Turn all exceptions into error bodies."""

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
        body, status = http_answer(500, "internal error; see the service's log", g.request_id)
        return jsonify(body), status

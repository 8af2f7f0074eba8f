"""Access control: API keys, host names, and the origins of web pages."""

import hmac
import re
from urllib.parse import urlsplit

from flask import Flask, request
from flask_cors import CORS
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, Unauthorized

from stream_service.settings import ServiceSettings

OPEN_PATHS = frozenset({"/health", "/ready"})  # monitoring needs no key and no allowed host
_PORT = re.compile(r":\d+$")


def install_guard(app: Flask, settings: ServiceSettings) -> None:
    """Reject requests that `settings` does not allow, on all routes, existing or not."""
    keys = [key.encode() for key in settings.api_keys]

    @app.before_request
    def check_host() -> None:
        # Another site can point its own name at 127.0.0.1 ("DNS rebinding"), but the browser still
        # sends that name.
        host = request.headers.get("Host")
        if settings.allowed_hosts is None or host is None or request.path in OPEN_PATHS:
            return
        if (name := _PORT.sub("", host).lower()) not in settings.allowed_hosts:
            raise Forbidden(f"host {name} is not allowed; use localhost or the flag --allow-host")

    @app.before_request
    def check_origin() -> None:
        # CORS prevents pages of other sites from reading an answer, but not from sending a POST.
        origin = request.headers.get("Origin")
        if request.method != "POST" or origin is None or "*" in settings.cors_origins:
            return
        if origin not in settings.cors_origins and urlsplit(origin).netloc != request.host:
            raise Forbidden(f"origin {origin} is not allowed; use the flag --cors-origin")

    @app.before_request
    def check_key() -> None:
        preflight = (
            request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        )
        if not keys or request.path in OPEN_PATHS or preflight:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Compare all keys, each in constant time, so that the time reveals nothing about a key.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized(
                "the API key is missing or wrong; send a valid API key: Authorization: Bearer KEY",
                www_authenticate=WWWAuthenticate("bearer"),
            )

    if settings.cors_origins:
        CORS(
            app,
            origins=list(settings.cors_origins),
            expose_headers=["X-Request-Id", "Retry-After"],
            max_age=600,
        )

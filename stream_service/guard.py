"""Who may ask, from where: keys, hosts, and the origins of pages in a browser."""

import hmac
import re
from urllib.parse import urlsplit

from flask import Flask, request
from flask_cors import CORS
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, Unauthorized

from stream_service.settings import ServiceSettings

OPEN_PATHS = frozenset({"/health", "/ready"})  # for those who watch over the process
_PORT = re.compile(r":\d+$")


def install_guard(app: Flask, settings: ServiceSettings) -> None:
    """Refuse what `settings` does not allow, on every route there is and on those there are not."""
    keys = [key.encode() for key in settings.api_keys]

    @app.before_request
    def check_host() -> None:
        # A page of another site can make its own name mean 127.0.0.1 ("DNS rebinding"), but not
        # hide that name.
        host = request.headers.get("Host")
        if settings.allowed_hosts is None or host is None or request.path in OPEN_PATHS:
            return
        if _PORT.sub("", host).lower() not in settings.allowed_hosts:
            raise Forbidden("this Host is not allowed; use localhost, or start with --allow-host")

    @app.before_request
    def check_origin() -> None:
        # CORS keeps other sites' pages from reading an answer, but not from sending a POST.
        origin = request.headers.get("Origin")
        if request.method != "POST" or origin is None or "*" in settings.cors_origins:
            return
        if origin not in settings.cors_origins and urlsplit(origin).netloc != request.host:
            raise Forbidden("pages of this origin may not ask; start with --cors-origin ORIGIN")

    @app.before_request
    def check_key() -> None:
        preflight = (
            request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        )
        if not keys or request.path in OPEN_PATHS or preflight:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # All are compared, each in constant time, so that time tells nothing.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized(
                "give a valid API key: Authorization: Bearer KEY",
                www_authenticate=WWWAuthenticate("bearer"),
            )

    if settings.cors_origins:
        CORS(
            app,
            origins=list(settings.cors_origins),
            expose_headers=["X-Request-Id", "Retry-After"],
            max_age=600,
        )

"""The settings of the HTTP layer."""

import re
from dataclasses import dataclass

MAX_BODY_BYTES = 4 * 1024 * 1024
# flask-cors would read other strings as patterns.
_ORIGIN = re.compile(r"https?://[\w.-]+(:\d+)?|null", re.ASCII)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of the HTTP layer. Raises `ValueError` for wrong or contradictory settings.

    api_keys: each request must have one of these keys; if empty, no key is required.
    allowed_hosts: host names, without a port, to which requests may be sent; None: all names.
    cors_origins: the origins whose pages may send requests. max_body: bytes of a request's body.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: frozenset[str] | None = None
    cors_origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY_BYTES

    def __post_init__(self) -> None:
        if self.api_keys and "*" in self.cors_origins:
            raise ValueError("the CORS origin * is not allowed with API keys; name each origin")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin} is not an origin; write https://name or http://name:port, "
                    "without a path"
                )
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ValueError("an API key must be one or more printable ASCII characters")

"""What the person who runs the service decides about HTTP."""

import re
from dataclasses import dataclass

MAX_BODY_BYTES = 4 * 1024 * 1024
# What flask-cors would read as a pattern is no origin.
_ORIGIN = re.compile(r"https?://[\w.-]+(:\d+)?|null", re.ASCII)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class ServiceSettings:
    """api_keys: one of them must come with each request; none: everybody may ask.

    allowed_hosts: what a request's Host may be, without its port; None: anything.
    cors_origins: whose pages in a browser may ask. max_body: bytes.
    Raises `ValueError` for what must not go together.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: frozenset[str] | None = None
    cors_origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY_BYTES

    def __post_init__(self) -> None:
        if self.api_keys and "*" in self.cors_origins:
            raise ValueError(
                "with API keys, CORS must not be open to every origin; name them instead of *"
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin} is no origin; give it as https://name or http://name:port, "
                    "without a path"
                )
        if not all(key and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ValueError("an API key must be of printable ASCII characters, and not empty")

"""Addresses of this machine, which no proxy can reach."""

import ipaddress
import os
from urllib.parse import urlsplit

NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is this machine: localhost, 127.0.0.0/8 or ::1."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback_url(url: str) -> bool:
    """Whether the host of a URL is this machine; a malformed URL has none."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def bypass_proxies(*hosts: str) -> None:
    """Let no library of this process ask a proxy for loopback addresses, nor for these hosts.

    Libraries read HTTP_PROXY and NO_PROXY from the environment; both spellings are extended.
    """
    names = ("no_proxy", "NO_PROXY")
    known = [host.strip() for name in names for host in os.environ.get(name, "").split(",")]
    known = [host for host in known if host]
    added = [host.strip("[]") for host in (*NAMES, *hosts)]
    # "*" excepts every host, but only where it stands alone.
    excepted = "*" if "*" in known else ",".join(dict.fromkeys([*known, *added]))
    for name in names:
        os.environ[name] = excepted

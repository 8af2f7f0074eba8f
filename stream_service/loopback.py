"""Loopback addresses, which no proxy can reach."""

import ipaddress
import os
from urllib.parse import urlsplit

NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Tell whether a host without a port is localhost, a subdomain of it, 127.0.0.0/8 or ::1."""
    host = host.strip("[]").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback_url(url: str) -> bool:
    """Tell whether the host of a URL is a loopback address. A malformed URL has no host."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def bypass_proxies(*hosts: str) -> None:
    """Prevent all libraries of this process from using a proxy for `hosts` and loopback addresses.

    Some libraries read NO_PROXY from the environment and some read no_proxy, so this extends both.
    """
    names = ("no_proxy", "NO_PROXY")
    known = [host.strip() for name in names for host in os.environ.get(name, "").split(",")]
    known = [host for host in known if host]
    added = [host.strip("[]") for host in (*NAMES, *hosts)]
    # "*" excepts every host, but only as the whole value.
    excepted = "*" if "*" in known else ",".join(dict.fromkeys([*known, *added]))
    for name in names:
        os.environ[name] = excepted

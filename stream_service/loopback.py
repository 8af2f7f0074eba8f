"""Addresses of this machine, which no proxy can reach."""

import ipaddress
import os

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


def bypass_proxies(*hosts: str) -> None:
    """Let no library of this process ask a proxy for loopback addresses, nor for these hosts.

    Libraries read HTTP_PROXY and NO_PROXY from the environment; both spellings are extended.
    """
    names = ("no_proxy", "NO_PROXY")
    known = [host for name in names for host in os.environ.get(name, "").split(",") if host]
    added = [host.strip("[]") for host in (*NAMES, *hosts)]
    for name in names:
        os.environ[name] = ",".join(dict.fromkeys([*known, *added]))

"""Loopback addresses are recognised, and requests to them bypass proxies."""

from urllib.request import getproxies, proxy_bypass

import pytest

from stream_service.loopback import bypass_proxies, is_loopback, is_loopback_url


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "page.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]
)
def test_every_loopback_name_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "127.example.org", "localhost.example.org", "10.0.0.1", "::", "1270.0.1"],
)
def test_other_host_names_are_not_taken_for_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("spelling", ["NO_PROXY", "no_proxy"])
def test_bypass_proxies_keeps_the_hosts_in_no_proxy(
    spelling: str, unreachable_proxy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(spelling, "intern.example")
    monkeypatch.setenv({"NO_PROXY": "no_proxy", "no_proxy": "NO_PROXY"}[spelling], "")
    bypass_proxies("10.1.2.3")
    assert getproxies()["http"] == "http://127.0.0.1:9"
    for host in ("intern.example", "localhost", "127.0.0.1", "::1", "10.1.2.3"):
        assert proxy_bypass(host), host
    assert not proxy_bypass("llm.example")


def test_bypass_proxies_keeps_a_no_proxy_for_all_hosts(
    unreachable_proxy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    bypass_proxies("localhost")
    assert proxy_bypass("llm.example")


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        ("http://localhost:8800/v1", True),
        ("http://[::1]:8800", True),
        ("http://llm.example", False),
        ("localhost", False),
        ("http://[::1", False),
    ],
)
def test_a_url_is_loopback_if_its_host_is(url: str, is_local: bool) -> None:
    assert is_loopback_url(url) == is_local

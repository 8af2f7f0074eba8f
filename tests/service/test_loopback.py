"""Addresses of this machine are known as such, and never asked for through a proxy."""

from urllib.request import getproxies, proxy_bypass

import pytest

from stream_service.loopback import bypass_proxies, is_loopback, is_loopback_url


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "page.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]
)
def test_this_machine_is_known_by_all_its_names(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "127.example.org", "localhost.example.org", "10.0.0.1", "::", "1270.0.1"],
)
def test_other_machines_are_not_taken_for_it(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("spelling", ["NO_PROXY", "no_proxy"])
def test_what_the_environment_excepts_already_stays_excepted(
    spelling: str, proxy_that_is_away: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(spelling, "intern.example")
    monkeypatch.setenv({"NO_PROXY": "no_proxy", "no_proxy": "NO_PROXY"}[spelling], "")
    bypass_proxies("10.1.2.3")
    assert getproxies()["http"] == "http://127.0.0.1:9"
    for host in ("intern.example", "localhost", "127.0.0.1", "::1", "10.1.2.3"):
        assert proxy_bypass(host), host
    assert not proxy_bypass("llm.example")


def test_where_no_host_goes_through_the_proxy_it_stays_so(
    proxy_that_is_away: None, monkeypatch: pytest.MonkeyPatch
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
def test_the_host_of_a_url_decides(url: str, is_local: bool) -> None:
    assert is_loopback_url(url) == is_local

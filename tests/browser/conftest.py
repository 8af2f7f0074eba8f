"""The real service, the page and Chromium, started once for all browser tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from support.browser import started_chromium, started_page, started_service, visit
from support.pages import SHORT
from support.processes import Process
from support.waiting import TIMEOUT


@pytest.fixture(scope="session")
def service() -> Iterator[Process]:
    with started_service() as running:
        yield running


@pytest.fixture(scope="session")
def page_process(service: Process) -> Iterator[Process]:
    with started_page(service) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with started_chromium() as browser:
        yield browser


@pytest.fixture
def visitor(chromium: Browser, page_process: Process) -> Iterator[Callable[..., Page]]:
    """Open the page in a new browser profile. Fail after script errors and foreign requests."""
    contexts: list[BrowserContext] = []
    foreign_urls: list[str] = []
    errors: list[str] = []

    def record(url: str) -> None:
        if not url.startswith((page_process.url, "data:", "blob:")):
            foreign_urls.append(url)

    def load(turns: Any = None, profile: dict[str, Any] | None = None, **settings: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
        context = chromium.new_context(**(options | (profile or {})))
        context.set_default_timeout(TIMEOUT * 1000)
        context.on("request", lambda request: record(request.url))
        contexts.append(context)
        page = visit(context, page_process.url, turns, **(settings or SHORT))
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    expect.set_options(timeout=TIMEOUT * 1000)
    yield load
    for context in contexts:
        context.close()
    assert foreign_urls == []
    assert errors == []

"""What the browser's tests and the screenshots share: the real service, the page, and Chromium.

Both are started as people start them, on ports of their own, and can be killed and started again.
"""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from support.processes import Process, free_port


@contextmanager
def started_service() -> Iterator[Process]:
    """The service with the demo model, for two requests at a time."""
    port = free_port()
    options = ["-P", str(port), "--max-concurrent", "2", "--max-context", "2048"]
    service = Process("llama3_service.py", *options, ready="is ready", port=port, environment={})
    try:
        yield service
    finally:
        service.end()


@contextmanager
def started_page(service: Process) -> Iterator[Process]:
    port = free_port()
    environment = {"LLAMA3_ADDRESS": service.url, "GRADIO_SERVER_PORT": str(port)}
    page = Process("llama3_app.py", ready="Running on", port=port, environment=environment)
    try:
        yield page
    finally:
        page.end()


@contextmanager
def started_chromium() -> Iterator[Browser]:
    """The system's Chromium, or the one that Playwright has installed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"],  # as root, which a container's user is, it has none
        )
        yield browser
        browser.close()


def visit(
    context: BrowserContext,
    address: str,
    turns: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Page:
    """A visitor whose browser has kept one conversation: these turns, and these settings."""
    conversation = {
        "version": 1, "id": uuid.uuid4().hex, "name": (turns or [{"content": ""}])[0]["content"],
        "updated": 1.0, "settings": settings, "turns": turns or [],
    }  # fmt: skip
    page = context.new_page()
    page.add_init_script(
        f"""(() => {{
            if (sessionStorage.getItem("llm-chat-open")) return;
            const conversation = {json.dumps(conversation)};
            sessionStorage.setItem("llm-chat-open", conversation.id);
            localStorage.setItem("llm-chat:" + conversation.id, JSON.stringify(conversation));
        }})();"""
    )
    page.goto(address)
    page.locator("#status h1").wait_for()
    return page

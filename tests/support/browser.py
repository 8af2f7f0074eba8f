"""The real service, the page and Chromium, for browser tests and screenshots.

Service and page run as their commands, each on its own port, and can be killed and restarted.
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
    """Run the service with the demo model, for two requests at a time."""
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
    """Run the system's Chromium, or Playwright's own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"],  # Chromium has no sandbox for root, the user in a container
        )
        yield browser
        browser.close()


def visit(
    context: BrowserContext,
    address: str,
    turns: list[dict[str, Any]] | None = None,
    **settings: Any,
) -> Page:
    """Open the page in a browser that holds one conversation with these turns and settings."""
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

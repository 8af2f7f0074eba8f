"""What the browser's tests and the screenshots share: the real service, the page, and Chromium.

Both are started as people start them, on ports of their own, and can be killed and started again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

ROOT = Path(__file__).parents[2]


class Process:
    """One of the two commands, at an address that it keeps. It is up when it says `ready`."""

    def __init__(self, *command: str, ready: str, port: int, environment: dict[str, str]):
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, *command]
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self._ready = ready
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = self._process.stdout
        assert output is not None
        said = []
        for line in output:
            said.append(line)
            if self._ready in line:
                break
        else:
            raise AssertionError("".join(said))
        # What else it says must be read, or it would wait for a reader some day.
        self._reader = threading.Thread(target=output.read)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """At once, as when the power fails."""
        self._end_by(signal.SIGKILL)

    def end(self) -> None:
        self._end_by(signal.SIGTERM)

    def _end_by(self, number: signal.Signals) -> None:
        with self._process as process:  # which waits, and closes what it was read by
            process.send_signal(number)
            self._reader.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


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

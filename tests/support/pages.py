"""Actions of the browser tests on a page, and what the tests read there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from playwright.sync_api import Locator, Page
from support.processes import Process

from stream_service.client import StreamClient

IN_A_BROWSER = [
    pytest.mark.browser,
    # Playwright leaves its event loop to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SHORT = {"max_new_tokens": 12, "temperature": 0}
LONG = {"min_new_tokens": 1500, "max_new_tokens": 1500, "temperature": 0.8, "seed": 1}
ASK = "Write a long story about the sea."
CODE = "```python\nfor n in range(3):\n    print('<b>', n)\n```"
RICH = f"<think>\nhidden thoughts\n</think>\n\n# Head\n\nText with $x^2$ and `code`.\n\n{CODE}\n\n"
RICH += "| a | b |\n|---|---|\n| 1 | 2 |\n\n- one\n- two\n\n[a link](https://example.org)"


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(answer: str = "The sea is blue.", question: str = "What is the sea?") -> list[Any]:
    figures = {"prompt_tokens": 5, "completion_tokens": 4, "finish_reason": "stop"}
    figures["params"] = {"temperature": 0.5}
    return [said("user", question), said("assistant", answer, figures=figures)]


def send(page: Page, text: str) -> None:
    page.locator("#box textarea").fill(text)
    page.keyboard.press("Enter")


def halt(page: Page) -> None:
    """Stop the reply that `writing` waits for. The reply may have finished already."""
    page.wait_for_function("window.began")
    page.evaluate("document.querySelector('#box .stop-button')?.click()")


def answers(page: Page) -> Locator:
    """The texts of the model's replies, without the lines of figures."""
    return page.locator(
        "#chat .bot-row:not(:has(.meter, .notice, .thought-group)) .message-content"
    )


def meters(page: Page) -> Locator:
    return page.locator("#chat .meter")


@contextmanager
def writing(page: Page) -> Iterator[None]:
    """Wait, after the block, until the reply that the block begins is complete."""
    page.evaluate(
        """() => {
            window.began = false;
            new MutationObserver((changes, observer) => {
                if (!document.querySelector("#box .stop-button")) return;
                window.began = true;
                observer.disconnect();
            }).observe(document.querySelector("#box"), {subtree: true, childList: true});
        }"""
    )
    yield
    page.wait_for_function("window.began && !document.querySelector('#box .stop-button')")


@contextmanager
def settling(page: Page, events: int) -> Iterator[None]:
    """Wait, after the block, until this number of events of the block has been handled."""
    page.evaluate(
        """() => {
            window.entered = 0;
            const enter = (window.enter ??= window.eventQueue.enter);
            window.eventQueue.enter = (...values) => (window.entered++, enter(...values));
        }"""
    )
    yield
    page.wait_for_function(f"window.entered >= {events}")
    page.evaluate("window.eventQueue.enter(null, false).then(() => window.eventQueue.leave())")


def conversations(page: Page) -> dict[str, Any]:
    """The conversations that the browser keeps, by name."""
    return {kept["name"]: kept for kept in page.evaluate("window.conversations.all()")}


def chosen(page: Page, name: str) -> Locator:
    return page.locator("#chat .option", has_text=name)


def figure(service: Process, name: str) -> float:
    """A figure from the service's `/metrics`."""
    lines = requests.get(service.url + "/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


@contextmanager
def both_slots_busy(service: Process) -> Iterator[None]:
    client = StreamClient(service.url)
    streams = [client.stream(ASK, min_new_tokens=1500, max_new_tokens=1500) for _ in range(2)]
    for stream in streams:
        next(stream)
    yield
    for stream in streams:
        stream.close()

"""The chat page as the service's child process, and what the service does when it ends."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.waiting import wait_for

from stream_service.page_process import PageProcess, page_environment


def script(directory: Path, source: str) -> Path:
    path = directory / "page.py"
    path.write_text(f"import os, sys\n{source}\n")
    return path


@pytest.mark.parametrize("failure", ["sys.exit('no port')", "sys.exit(2)", "import no_such_page"])
def test_a_page_that_fails_to_start_is_reported_at_once(
    failure: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reported = threading.Event()
    page = PageProcess(script(tmp_path, failure), {}, reported.set)
    wait_for(reported)
    assert page.failed
    assert "could not start, so the service ends" in caplog.text
    page.end()


@contextmanager
def until_something_is_logged() -> Iterator[None]:
    """Leave the block only after something has been logged."""
    logged = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    logger = logging.getLogger()  # runs the listener after `caplog`'s handler
    logger.addHandler(listener := Listener())
    try:
        yield
        wait_for(logged)
    finally:
        logger.removeHandler(listener)


def test_a_page_that_crashes_later_does_not_end_the_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with until_something_is_logged():
        page = PageProcess(script(tmp_path, "os.abort()"), {}, lambda: pytest.fail("page was up"))
    assert not page.failed
    assert "the service continues without it" in caplog.text
    page.end()


def test_a_page_that_exits_with_status_0_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A service manager may send SIGTERM to the page, too, which then exits with 0."""
    caplog.set_level(logging.INFO)
    with until_something_is_logged():
        page = PageProcess(script(tmp_path, "sys.exit(0)"), {}, lambda: pytest.fail("status 0"))
    assert not page.failed
    assert [record.message for record in caplog.records] == ["the chat page has ended"]
    page.end()


def test_a_page_that_the_service_ends_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for end in (PageProcess.end, PageProcess.kill):
        page = PageProcess(
            script(tmp_path, "os.read(0, 1)"), {}, lambda: pytest.fail("the service ended it")
        )
        end(page)
        page.end()
        assert not page.failed
    assert not caplog.records


def test_the_page_gets_the_services_address_and_api_key() -> None:
    assert page_environment("127.0.0.1", 7860, "http://127.0.0.1:8800", None) == {
        "LLAMA3_ADDRESS": "http://127.0.0.1:8800",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": "7860",
    }
    with_key = page_environment("::1", 7860, "http://[::1]:8800", "secret")
    assert with_key["GRADIO_SERVER_NAME"] == "[::1]"
    assert with_key["LLAMA3_API_KEY"] == "secret"

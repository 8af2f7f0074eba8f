"""The page beside the service: what becomes of the one when the other ends."""

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
def logging_something() -> Iterator[None]:
    """Leave the block when something is logged."""
    said = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    logger = logging.getLogger()  # behind the handler of `caplog`
    logger.addHandler(listener := Listener())
    try:
        yield
        wait_for(said)
    finally:
        logger.removeHandler(listener)


def test_a_page_that_dies_later_leaves_the_service_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with logging_something():
        page = PageProcess(script(tmp_path, "os.abort()"), {}, lambda: pytest.fail("it had begun"))
    assert not page.failed
    assert "the service continues without it" in caplog.text
    page.end()


def test_a_page_that_was_ended_by_others_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a service manager sends SIGTERM to every process of a service."""
    caplog.set_level(logging.INFO)
    with logging_something():
        page = PageProcess(script(tmp_path, "sys.exit(0)"), {}, lambda: pytest.fail("it was ended"))
    assert not page.failed
    assert [record.message for record in caplog.records] == ["the chat page has ended"]
    page.end()


def test_a_page_that_is_ended_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for end in (PageProcess.end, PageProcess.kill):
        page = PageProcess(
            script(tmp_path, "os.read(0, 1)"), {}, lambda: pytest.fail("it was ended")
        )
        end(page)
        page.end()
        assert not page.failed
    assert not caplog.records


def test_the_page_listens_where_the_service_does_and_has_its_key() -> None:
    assert page_environment("127.0.0.1", 7860, "http://127.0.0.1:8800", None) == {
        "LLAMA3_ADDRESS": "http://127.0.0.1:8800",
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": "7860",
    }
    with_key = page_environment("::1", 7860, "http://[::1]:8800", "secret")
    assert with_key["GRADIO_SERVER_NAME"] == "[::1]"
    assert with_key["LLAMA3_API_KEY"] == "secret"

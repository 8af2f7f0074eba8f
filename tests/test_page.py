"""The chat page's side of the stream."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import gradio_client
import pytest
from conftest import ServiceFactory
from fakes import Gate, fake_checkpoint, says

import llama3_app

ROOT = Path(__file__).parent.parent


def replies(message: str = "hi", history: Any = (), system_prompt: str = "") -> list[str]:
    return list(llama3_app.reply(message, list(history), system_prompt))


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda url: monkeypatch.setenv("LLAMA3_ADDRESS", url)


def test_the_reply_grows_with_each_delta(serve: ServiceFactory, address: Any) -> None:
    gate = Gate(says("abc"))
    address(serve(fake_checkpoint(gate)).url)
    growing = llama3_app.reply("hi", [], "")
    for n, expected in enumerate(["a", "ab", "abc"], start=1):
        gate.allow()
        assert next(growing) == expected
        assert gate.computed == n
    gate.allow()
    assert list(growing) == []


def test_history_and_system_prompt_go_along(serve: ServiceFactory, address: Any) -> None:
    prompts: list[bytes] = []

    def spy(ids: list[int]) -> int:
        prompts.append(bytes(i for i in ids if i < 256))
        return says("x")(ids)

    address(serve(fake_checkpoint(spy)).url)
    history = [  # as Gradio hands it over
        {"role": "user", "metadata": None, "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "metadata": None, "content": [{"type": "text", "text": "b"}]},
    ]
    assert replies("c", history, "p") == ["x"]
    assert prompts[0] == b"system:puser:aassistant:buser:cassistant:"


def test_what_goes_wrong_is_a_sentence_in_the_chat(serve: ServiceFactory, address: Any) -> None:
    address("http://127.0.0.1:9")
    (sentence,) = replies()
    assert "is not there" in sentence
    assert "llama3_service.py" in sentence

    def breaks(ids: list[int]) -> int:
        if bytes(ids[-1:]) == b"b":
            raise RuntimeError
        return says("abc")(ids)

    address(serve(fake_checkpoint(breaks)).url)
    *_, last = replies()
    assert last.startswith("ab\n\n⚠️ The service could not reply:")
    (refused,) = replies("a" * 2000)
    assert "context holds 512" in refused


def test_the_page_is_set_as_promised() -> None:
    page = llama3_app.demo
    assert isinstance(page, gr.ChatInterface)
    assert page.concurrency_limit is None
    assert page.analytics_enabled is False


def test_the_page_starts_and_streams_what_a_visitor_asks(serve: ServiceFactory) -> None:
    """`python llama3_app.py` on a free port; a visitor who touches nothing but the message box."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
        "LLAMA3_ADDRESS": serve(fake_checkpoint(says("彩虹!"))).url,
    }
    process = subprocess.Popen(
        [sys.executable, "llama3_app.py"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "http://" in line)
            url = line[line.index("http://") :].split()[0]
            visitor = gradio_client.Client(url, verbose=False)
            *_, last = visitor.submit("hi", None, api_name="/chat")
            visitor.close()
            assert "彩虹!" in str(last)
        finally:
            process.terminate()

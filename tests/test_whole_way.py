"""The project as a user runs it: the command, the demo model, curl, the page, Ctrl-C."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from support.processes import ROOT, free_port
from support.service import running_service
from support.waiting import TIMEOUT, wait_for

from stream_generator.loaded_model import Checkpoint
from stream_service.client import StreamClient

RAINBOW = "Explain how a rainbow forms."


class Command:
    """A process of `python llama3_service.py ...`, whose output is read line by line."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, "llama3_service.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.seen = ""

    def read_until(self, pattern: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen += line
            if found := re.search(pattern, line):
                return found.group()
        raise AssertionError(f"no {pattern!r} in:\n{self.seen}")

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=TIMEOUT)
        self.seen += output
        return self.process.returncode


@pytest.fixture
def command() -> Iterator[type[Command]]:
    started: list[Command] = []

    class Started(Command):
        def __init__(self, *arguments: str):
            super().__init__(*arguments)
            started.append(self)

    yield Started
    for service in started:
        for _ in range(2):  # the second signal ends service and page at once
            if service.process.poll() is None:
                service.process.terminate()
        service.process.communicate(timeout=TIMEOUT)


def test_the_service_and_its_page_start_serve_and_end_together(
    demo: Checkpoint, command: type[Command], unreachable_proxy: None
) -> None:
    """An unreachable proxy in the environment must not matter."""
    page_port = free_port()
    service = command("-P", "0", "--app", "--app-port", str(page_port))
    address = service.read_until(r"http://[\d.]+:\d+")
    line = service.read_until(r"curl -N .*")

    words = shlex.split(line)
    words[words.index("-d") + 1] = json.dumps({"query": RAINBOW, "max_new_tokens": 24, "seed": 1})
    with subprocess.Popen([*words, "-sS"], stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        pieces = list(iter(lambda: os.read(curl.stdout.fileno(), 4096), b""))
    assert curl.returncode == 0
    assert len(pieces) > 5, "the reply must come in pieces"
    assert len(b"".join(pieces).decode().split()) > 5

    about = StreamClient(address).about()
    assert about["tokens_per_second"] > 0
    printed = re.search(r"one stream gets (\S+) tokens per second", service.seen)
    assert printed
    assert float(printed[1]) == pytest.approx(about["tokens_per_second"], abs=0.55)

    page = service.read_until(rf"http://[\d.]+:{page_port}")
    direct = requests.Session()
    direct.trust_env = False  # bypass the proxy
    assert demo.name in shown_when_opened(page, direct)
    assert service.end(signal.SIGINT) == 0
    assert "Traceback" not in service.seen
    for url in (address, page):
        with pytest.raises(requests.ConnectionError):
            direct.get(url, timeout=TIMEOUT)


def shown_when_opened(page: str, session: requests.Session) -> str:
    """What the page sends to a browser that opens it."""
    opening = next(
        function["id"]
        for function in session.get(f"{page}/config", timeout=TIMEOUT).json()["dependencies"]
        if [event for _, event in function["targets"]] == ["load"]
    )
    body = {"data": [None, None], "fn_index": opening, "session_hash": "visitor"}
    session.post(f"{page}/gradio_api/queue/join", json=body, timeout=TIMEOUT).raise_for_status()
    shown = session.get(
        f"{page}/gradio_api/queue/data", params={"session_hash": "visitor"}, timeout=TIMEOUT
    ).text
    assert "process_completed" in shown
    return shown


def test_a_page_that_cannot_start_ends_the_service_with_status_1(
    demo: Checkpoint, command: type[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA3_APP_AUTH", "a name alone")
    service = command("-P", "0", "--app", "--app-port", "0")
    service.read_until("--auth must have the form NAME:PASSWORD")
    service.read_until("the chat page could not start, so the service ends")
    assert service.process.wait(TIMEOUT) == 1


def test_a_page_ends_when_its_service_is_killed(demo: Checkpoint, command: type[Command]) -> None:
    page_port = free_port()
    service = command("-P", "0", "--app", "--app-port", str(page_port))
    page = service.read_until(rf"http://[\d.]+:{page_port}")
    assert requests.get(page, timeout=TIMEOUT).ok
    service.process.kill()
    service.process.communicate(timeout=TIMEOUT)  # returns when the page has ended, too
    with pytest.raises(requests.ConnectionError):
        requests.get(page, timeout=TIMEOUT)


def status(address: str, path: str) -> int:
    return requests.get(f"{address}/{path}", timeout=TIMEOUT).status_code


def begun_stream(address: str, tokens: int) -> Iterator[bytes]:
    """Begin a stream, read its first token, and return the lines after it."""
    response = requests.post(
        f"{address}/stream",
        json={"query": RAINBOW, "min_new_tokens": tokens, "max_new_tokens": tokens},
        headers={"Accept": "application/x-ndjson"},
        stream=True,
        timeout=TIMEOUT,
    )
    lines: Iterator[bytes] = response.iter_lines(chunk_size=None)
    assert json.loads(next(lines))["event"] == "start"
    assert json.loads(next(lines))["event"] == "delta"
    return lines


def test_after_a_signal_open_streams_finish_and_new_requests_are_rejected(
    demo: Checkpoint, command: type[Command]
) -> None:
    service = command("-P", "0", "--drain", "600")  # seconds, enough for any machine
    address = service.read_until(r"http://[\d.]+:\d+")
    lines = begun_stream(address, 150)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: status(address, "ready") == 503)
    rejected = requests.post(f"{address}/stream", json={"query": "hi"}, timeout=TIMEOUT)
    assert rejected.status_code == 503
    assert int(rejected.headers["Retry-After"]) >= 1
    end = json.loads(list(lines)[-1])
    assert (end["event"], end["usage"]["completion_tokens"]) == ("end", 150)
    assert service.process.wait(TIMEOUT) == 0


def test_a_stream_that_outlasts_the_drain_gets_an_error_and_the_service_ends_with_0(
    demo: Checkpoint, command: type[Command]
) -> None:
    service = command("-P", "0", "--drain", "0")
    lines = begun_stream(service.read_until(r"http://[\d.]+:\d+"), 5000)
    service.process.send_signal(signal.SIGTERM)
    error = json.loads(list(lines)[-1])
    assert (error["event"], error["error"]["code"]) == ("error", "unavailable")
    assert service.process.wait(TIMEOUT) == 0


def test_a_second_signal_ends_the_service_and_its_page_at_once(
    demo: Checkpoint, command: type[Command]
) -> None:
    page_port = free_port()
    service = command("-P", "0", "--app", "--app-port", str(page_port))
    address = service.read_until(r"http://[\d.]+:\d+")
    page = service.read_until(rf"http://[\d.]+:{page_port}")
    lines = begun_stream(address, 5000)
    service.process.send_signal(signal.SIGTERM)
    wait_for(lambda: status(address, "ready") == 503)
    service.process.send_signal(signal.SIGTERM)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        list(lines)
    assert service.process.wait(TIMEOUT) == 1
    with pytest.raises(requests.ConnectionError):
        requests.get(page, timeout=TIMEOUT)


def test_the_service_is_not_ready_while_the_model_loads(command: type[Command]) -> None:
    port = free_port()
    service = command("-P", str(port))
    address = f"http://127.0.0.1:{port}"
    statuses: list[int] = []

    def is_ready() -> bool:
        try:
            statuses.append(status(address, "ready"))
            assert status(address, "health") == 200
        except requests.ConnectionError:
            assert service.process.poll() is None
            assert not statuses, "the service stopped listening"
        return statuses[-1:] == [200]

    wait_for(is_ready)
    assert statuses[0] == 503


def test_a_service_with_keys_requires_one_and_passes_it_to_its_page(
    demo: Checkpoint, command: type[Command], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first-key\nsecond-key\n")
    page_port = free_port()
    service = command(
        "-P", "0", "--api-key-file", str(keys), "--app", "--app-port", str(page_port)
    )  # fmt: skip
    address = service.read_until(r"http://[\d.]+:\d+")
    assert "Authorization: Bearer" in service.read_until(r"curl -N .*")
    assert requests.get(address, timeout=TIMEOUT).status_code == 401
    client = StreamClient(address, api_key="second-key")
    assert client.chat(RAINBOW, max_new_tokens=3)["usage"]["completion_tokens"] == 3
    page = service.read_until(rf"http://[\d.]+:{page_port}")
    # Only a page with a key can show the model's name.
    assert demo.name in shown_when_opened(page, requests.Session())
    assert service.end(signal.SIGTERM) == 0
    assert "first-key" not in service.seen


def test_a_taken_port_and_a_missing_model_are_reported_clearly(command: type[Command]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = command("-P", str(port))
        service.read_until(rf"cannot listen on 127.0.0.1:{port}: .*choose another --port")
        assert service.process.wait(TIMEOUT) == 1
        page = command("-P", "0", "--app", "--app-port", str(port))
        page.read_until(rf"cannot listen on 127.0.0.1:{port}: .*choose another --app-port")
        assert page.process.wait(TIMEOUT) == 1
    service = command("-P", "0", "-c", "/no/such/model")
    service.read_until("/no/such/model does not exist")
    assert service.process.wait(TIMEOUT) == 1
    assert "Traceback" not in service.seen


def test_a_streamed_reply_equals_the_whole_reply(demo: Checkpoint) -> None:
    with running_service(demo) as service:
        client = StreamClient(service.url)
        params = {"max_new_tokens": 40, "seed": 3, "temperature": 1.0}
        reply = client.stream(RAINBOW, **params)
        text = "".join(reply)
        # In bfloat16 a sum's last bits depend on how much of the prompt is computed at once.
        requests.post(f"{service.url}/clear").raise_for_status()
        assert text == client.chat(RAINBOW, **params)["response"]
        assert reply.end["usage"]["completion_tokens"] == 40
        again = client.stream(RAINBOW, **{**params, "seed": 4})
        assert "".join(again) != reply.text


def test_a_conversation_continues_with_the_returned_history(demo: Checkpoint) -> None:
    with running_service(demo) as service:

        def ask(**body: Any) -> dict[str, Any]:
            body = {"temperature": 0, "max_new_tokens": 24, **body}
            return requests.post(f"{service.url}/chat", json=body, timeout=TIMEOUT).json()

        first = ask(query="Name one colour.")
        second = ask(query="Name another.", history=first["history"])
        messages = [
            {"role": "user", "content": "Name one colour."},
            {"role": "assistant", "content": first["response"]},
            {"role": "user", "content": "Name another."},
        ]
        same = ask(query=None, messages=messages)
        assert second["usage"] == same["usage"]
        assert second["response"] == same["response"]
        assert second["history"] == [
            ["Name one colour.", first["response"]],
            ["Name another.", second["response"]],
        ]

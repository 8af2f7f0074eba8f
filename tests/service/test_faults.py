"""A request that fails at any token fails alone, and its reply never looks complete."""

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from support.engines import free_slots
from support.fakes import fake_checkpoint, is_complete_prompt, reply_length, says
from support.service import RunningService, ServiceFactory, running_service
from support.waiting import TIMEOUT, wait_for

from stream_generator.engine.engine import Engine

REPLY = "".join(chr(97 + n % 26) for n in range(70))
FORMS = {
    "text": ("/stream", {"query": "%s"}, "text/plain"),
    "ndjson": ("/stream", {"query": "%s"}, "application/x-ndjson"),
    "sse": ("/stream", {"query": "%s"}, "text/event-stream"),
    "chat": ("/chat", {"query": "%s"}, "application/json"),
    "openai": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "%s"}]}, "*/*"),
    "openai stream": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "%s"}], "stream": True},
        "*/*",
    ),
}


def fails_as_the_prompt_says(ids: list[int]) -> int:
    """A prompt with "fail 7." gets seven tokens, and then a failure."""
    prompt = bytes(i for i in ids if i < 256).decode(errors="replace")
    if is_complete_prompt(ids) and "fail " in prompt:
        at = int(prompt.partition("fail ")[2].partition(".")[0])
        if reply_length(ids) == at:
            raise RuntimeError("/secret/path")
    return says(REPLY)(ids)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(fake_checkpoint(fails_as_the_prompt_says), max_waiting=32) as running:
        yield running


def ask(service: RunningService, form: str, query: str) -> requests.Response:
    path, body, accept = FORMS[form]
    body = json.loads(json.dumps(body).replace("%s", query))
    return requests.post(
        service.url + path, json=body, headers={"Accept": accept}, stream=True, timeout=TIMEOUT
    )


def received(response: requests.Response) -> tuple[str, bool]:
    """Return the body that arrived, and whether the connection broke off before its end."""
    data = b""
    try:
        for part in response.iter_content(None):
            data += part
    except requests.exceptions.ChunkedEncodingError:
        return data.decode(), True
    return data.decode(), False


def assert_failure_reported(form: str, response: requests.Response, tokens: int) -> None:
    """Check that an answer in this form reports a failure after this many tokens."""
    text, broke_off = received(response)
    assert "secret" not in text
    if form in ("chat", "openai") or (form == "text" and tokens == 0):
        assert response.status_code == 500
        assert json.loads(text)["error"]["code"] == "generation_failed"
        return
    assert response.status_code == 200
    if form == "text":
        assert broke_off, "the answer looks complete"
        assert text == REPLY[:tokens]
        return
    assert not broke_off
    lines = [line.removeprefix("data: ") for line in text.splitlines() if "{" in line]
    *events, last = (json.loads(line) for line in lines)
    assert last["error"]["code"] == "generation_failed"
    assert "[DONE]" not in text
    if form == "openai stream":
        deltas = [e["choices"][0]["delta"].get("content", "") for e in events]
        assert not any(e["choices"][0]["finish_reason"] for e in events)
    else:
        assert "end" not in {e["event"] for e in events}
        deltas = [e.get("delta", "") for e in events]
    assert "".join(deltas) == REPLY[:tokens]


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_at_any_token_hits_only_its_request(service: RunningService, form: str) -> None:
    def fail(tokens: int) -> None:
        with ask(service, form, f"fail {tokens}.") as response:
            assert_failure_reported(form, response, tokens)

    def neighbour(number: int) -> str:
        with ask(service, "text", f"neighbour {number}") as response:
            return received(response)[0]

    with ThreadPoolExecutor(4) as pool:
        neighbours = pool.map(neighbour, range(20))
        list(pool.map(fail, range(65)))
        assert list(neighbours) == [REPLY] * 20
    assert service.engine.life.is_accepting


def wait_until_idle(engine: Engine) -> None:
    wait_for(lambda: not engine.requests, engine)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_two_hundred_clients_that_leave_at_random_leak_nothing(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(says(REPLY * 5)), slots=4, max_waiting=28)
    rng = random.Random(0)
    forms = list(FORMS)

    def leave_at_random(number: int) -> None:
        form, patience = rng.choice(forms), rng.random()
        path, body, accept = FORMS[form]
        body = json.loads(json.dumps(body).replace("%s", "hi"))
        try:
            with requests.post(
                service.url + path, json=body, headers={"Accept": accept}, stream=True,
                timeout=(TIMEOUT, patience / 5 if form in ("chat", "openai") else TIMEOUT),
            ) as response:  # fmt: skip
                assert response.status_code == 200
                for _ in zip(range(rng.randrange(20)), response.iter_content(None), strict=False):
                    pass
        except requests.exceptions.ReadTimeout:
            pass

    ask(service, "text", "hi").close()
    wait_until_idle(service.engine)
    num_threads, num_files = threading.active_count(), open_files()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave_at_random, range(200)))
    wait_until_idle(service.engine)
    assert free_slots(service.engine) == 4

    def is_as_before() -> bool:
        """A request is released when waitress closes its answer, soon after the reply ends."""
        assert requests.get(f"{service.url}/ready", timeout=TIMEOUT).status_code == 200
        return service.has_no_open_request and open_files() <= num_files

    wait_for(is_as_before)
    assert threading.active_count() == num_threads
    with ask(service, "chat", "hi") as response:
        assert response.json()["response"] == REPLY * 5


@pytest.mark.parametrize("form", FORMS)
def test_each_form_marks_a_complete_reply_as_complete(service: RunningService, form: str) -> None:
    with ask(service, form, "hi") as response:
        text, broke_off = received(response)
    assert response.status_code == 200
    assert not broke_off
    ends: dict[str, Any] = {
        "text": lambda: text == REPLY,
        "ndjson": lambda: json.loads(text.splitlines()[-1])["event"] == "end",
        "sse": lambda: json.loads(text.split("data: ")[-1])["event"] == "end",
        "chat": lambda: json.loads(text)["finish_reason"] == "stop",
        "openai": lambda: json.loads(text)["choices"][0]["finish_reason"] == "stop",
        "openai stream": lambda: text.endswith("data: [DONE]\n\n"),
    }
    assert ends[form]()

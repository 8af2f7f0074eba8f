"""A request that fails fails alone, at whatever token, and never looks like one that ended well."""

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
from support.fakes import fake_checkpoint, is_complete_prompt, reply_of, says
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


def fails_where_it_is_told(ids: list[int]) -> int:
    """A user who says "fail 7." gets seven tokens, and then a fault."""
    prompt = bytes(i for i in ids if i < 256).decode(errors="replace")
    if is_complete_prompt(ids) and "fail " in prompt:
        at = int(prompt.partition("fail ")[2].partition(".")[0])
        if reply_of(ids) == at:
            raise RuntimeError("/secret/path")
    return says(REPLY)(ids)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(fake_checkpoint(fails_where_it_is_told), max_waiting=32) as running:
        yield running


def ask(service: RunningService, form: str, query: str) -> requests.Response:
    path, body, accept = FORMS[form]
    body = json.loads(json.dumps(body).replace("%s", query))
    return requests.post(
        service.url + path, json=body, headers={"Accept": accept}, stream=True, timeout=TIMEOUT
    )


def received(response: requests.Response) -> tuple[str, bool]:
    """The body as far as it came, and whether the connection broke off in it."""
    data = b""
    try:
        for part in response.iter_content(None):
            data += part
    except requests.exceptions.ChunkedEncodingError:
        return data.decode(), True
    return data.decode(), False


def told(form: str, response: requests.Response, tokens: int) -> None:
    """That a reply failed after so many tokens must be plain in each form."""
    text, broke_off = received(response)
    assert "secret" not in text
    if form in ("chat", "openai") or (form == "text" and tokens == 0):
        assert response.status_code == 500
        assert json.loads(text)["error"]["code"] == "generation_failed"
        return
    assert response.status_code == 200
    if form == "text":
        assert broke_off, "as if it were complete"
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
def test_a_fault_at_any_token_fails_that_request_alone(service: RunningService, form: str) -> None:
    def one(tokens: int) -> None:
        with ask(service, form, f"fail {tokens}.") as response:
            told(form, response, tokens)

    def neighbour(number: int) -> str:
        with ask(service, "text", f"neighbour {number}") as response:
            return received(response)[0]

    with ThreadPoolExecutor(4) as pool:
        neighbours = pool.map(neighbour, range(20))
        list(pool.map(one, range(65)))
        assert list(neighbours) == [REPLY] * 20
    assert service.engine.life.is_accepting


def wait_until_idle(engine: Engine) -> None:
    wait_for(lambda: not engine.requests, engine)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_two_hundred_who_leave_at_random_leave_nothing_behind(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(says(REPLY * 5)), slots=4, max_waiting=28)
    rng = random.Random(0)
    forms = list(FORMS)

    def come_and_go(number: int) -> None:
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
    threads, files = threading.active_count(), descriptors()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(come_and_go, range(200)))
    wait_until_idle(service.engine)
    assert free_slots(service.engine) == 4

    def is_as_before() -> bool:
        """A place is given back when waitress has closed the answer, soon after the reply ends."""
        assert requests.get(f"{service.url}/ready", timeout=TIMEOUT).status_code == 200
        return service.has_all_places_free and descriptors() <= files

    wait_for(is_as_before)
    assert threading.active_count() == threads
    with ask(service, "chat", "hi") as response:
        assert response.json()["response"] == REPLY * 5


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_that_ends_well_says_so_in_each_form(service: RunningService, form: str) -> None:
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

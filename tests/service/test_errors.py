"""The service's answers to failures and to requests that it cannot serve."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from support.fakes import Gate, fake_checkpoint, says
from support.http import (
    FORMS,
    assert_error_shape,
    ndjson,
    post,
    sse,
)
from support.service import ServiceFactory, running_service
from support.waiting import TIMEOUT, wait_for

from stream_generator.errors import StreamGeneratorError
from stream_service.errors import MAX_MESSAGE, answer


def failing_after(tokens: int) -> Any:
    def next_id(ids: list[int]) -> int:
        text = bytes(i for i in ids if i < 256).decode()
        if text.endswith("assistant:" + "abcdef"[:tokens]) and "fail" in text:
            raise RuntimeError("boom")
        return says("abcdef")(ids)

    return next_id


def test_a_failing_prefill_gives_status_500_in_text_and_chat(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(failing_after(0))).url
    for path in ("/stream", "/chat"):
        response = post(url, path, query="fail")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "generation_failed"
        assert post(url, path).status_code == 200, "the next request is served"


def test_a_failure_in_mid_stream_never_looks_like_a_finished_reply(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(failing_after(3))).url
    for accept, read in ((FORMS[1], ndjson), (FORMS[2], sse)):
        events = read(post(url, accept=accept, query="fail"))
        assert [e["event"] for e in events] == ["start", "delta", "delta", "delta", "error"]
        assert "RuntimeError" in events[-1]["error"]["message"]
    response = post(url, query="fail")
    received = b""
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        for chunk in response.iter_content(None):
            received += chunk
    assert received == b"abc"
    assert post(url, "/chat", query="fail").status_code == 500
    assert post(url).text == "abcdef"


def test_a_full_queue_gives_status_429(serve: ServiceFactory) -> None:
    gate = Gate(says("a"))
    service = serve(fake_checkpoint(gate), max_waiting=1, slots=1)
    threads = []
    for waiting in range(2):
        threads.append(threading.Thread(target=post, args=(service.url, "/chat")))
        threads[-1].start()
        if not waiting:
            wait_for(gate.arrived)
    wait_for(lambda: service.engine.waiting, service.engine)
    for accept in FORMS:
        rejected = post(service.url, accept=accept)
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (429, "queue_full")
    gate.allow(10)
    for thread in threads:
        wait_for(thread)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_service(fake_checkpoint(says("ok"), context_length=100)) as service:
        yield service.url


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/stream", 405),
        ("POST", "/", 405),
        ("GET", "/clear", 405),
        ("DELETE", "/chat", 405),
    ],
)
def test_a_wrong_path_or_method_gives_an_error_in_the_usual_format(
    url: str, method: str, path: str, status: int
) -> None:
    assert_error_shape(requests.request(method, url + path, timeout=TIMEOUT), status)


@pytest.mark.parametrize("path", ["/stream", "/chat"])
def test_a_malformed_body_gives_an_error_and_the_next_request_works(url: str, path: str) -> None:
    def send(data: bytes, content_type: str | None = "application/json", **headers: str) -> Any:
        if content_type:
            headers["Content-Type"] = content_type
        return requests.post(url + path, data=data, headers=headers, timeout=TIMEOUT)

    for body in (
        b"", b"{", b"nonsense", b"[1,2]", b'{"query": 1}', b'{"query": "\\ud800"}', b"\xff\xfe",
        b"[" * 100_000, b'{"query": "a", "seed": 1e999}', b'{"query": "a", "x": 1}', b"\x00" * 100,
        b'{"query": "a", "min_new_tokens": 5, "max_tokens": 4}',
        json.dumps({"query": "a", "\U0001f308" * 100: 1}).encode(),
        b'{"query": "a", "logit_bias": {"98": 1, "098": 2}}',
        b'{"query": "a", "' + b"k" * 10_000 + b'": 1}', b'{"query": "a", "stop": [[]]}',
    ):  # fmt: skip
        assert_error_shape(send(body), 400)
    assert_error_shape(send(b'{"query": "a"}', None), 415)
    assert_error_shape(send(b'{"query": "a"}', "text/plain"), 415)
    assert_error_shape(send(b"query=a", "application/x-www-form-urlencoded"), 415)
    long = assert_error_shape(send(json.dumps({"query": "a" * 200}).encode()), 400)
    assert long["code"] == "context_length_exceeded"
    assert "216 tokens" in long["message"]
    assert "100" in long["message"]
    huge = b'{"query": "' + b"a" * (4 * 1024 * 1024) + b'"}'
    assert_error_shape(send(huge), 413)
    assert_error_shape(send(iter([huge[:1000], huge[1000:]])), 413)
    if path == "/stream":
        assert_error_shape(send(b'{"query": "a"}', Accept="image/png"), 406)
    assert "ok" in send(b'{"query": "a"}', "application/json; charset=utf-8").text


def test_the_index_route_has_what_the_chat_page_needs(url: str) -> None:
    index = requests.get(url, timeout=TIMEOUT).json()
    assert (index["message"], index["success"]) == ("started", True)
    assert index["model"] == "fake"
    assert index["context_length"] == 100
    assert index["defaults"]["do_sample"] is False
    assert index["bounds"]["temperature"]["maximum"] == 5
    assert requests.get(url + "/health", timeout=TIMEOUT).json() == {"status": "ok"}
    assert requests.post(url + "/clear", timeout=TIMEOUT).json() == {"success": True}


def test_health_gives_status_503_after_the_engine_has_closed(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(says("a")))
    service.engine.close()
    assert requests.get(service.url + "/health", timeout=TIMEOUT).status_code == 503
    assert_error_shape(post(service.url), 503)


def test_every_exception_of_the_project_has_a_status_and_a_short_message() -> None:
    def classes(base: type) -> Iterator[type]:
        yield base
        for sub in base.__subclasses__():
            yield from classes(sub)

    for kind in classes(StreamGeneratorError):
        body, status = answer(kind("x" * 5000), "id")
        assert 400 <= status < 600
        assert len(body["error"]["message"]) == MAX_MESSAGE
        body, _ = answer(kind("彩🌈" * 3000), "id")
        assert len(json.dumps(body)) < 2048

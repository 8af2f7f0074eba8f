"""The service over real HTTP, on a model that the test holds by the hand."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from support.fakes import Gate, fake_checkpoint, says
from support.service import RunningService, ServiceFactory

from stream_generator.errors import StreamGeneratorError
from stream_generator.request import FinishReason
from stream_service import server
from stream_service.errors import MAX_MESSAGE, answer

TIMEOUT = 60  # seconds before a test that hangs fails; nothing waits for it otherwise
FORMS = ["text/plain", "application/x-ndjson", "text/event-stream"]


def post(url: str, path: str = "/stream", accept: str | None = None, **body: Any) -> Any:
    headers = {"Accept": accept} if accept else {}
    body = {"query": "hi", **body}
    return requests.post(url + path, json=body, headers=headers, stream=True, timeout=TIMEOUT)


def ndjson(response: requests.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.iter_lines(chunk_size=None)]


def sse(response: requests.Response) -> list[dict[str, Any]]:
    events = []
    for block in response.content.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['event']}"
    return events


@contextmanager
def raw_connection(url: str) -> Iterator[socket.socket]:
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=TIMEOUT) as connection:
        yield connection


def send_request(connection: socket.socket, accept: str = "*/*", **headers: str) -> None:
    body = b'{"query": "hi"}'
    lines = [
        "POST /stream HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Accept: {accept}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        more = connection.recv(4096)
        assert more, f"the connection ended before {wanted!r}: {data!r}"
        data += more
    return data


# The forms of an answer


@pytest.mark.parametrize("accept", [None, "*/*", "text/plain", "text/*"])
def test_plain_text_is_the_reply_and_nothing_else(serve: ServiceFactory, accept: str) -> None:
    response = post(serve(fake_checkpoint(says("彩虹 🌈\n"))).url, accept=accept)
    assert response.content.decode() == "彩虹 🌈\n"
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"


@pytest.mark.parametrize(("accept", "read"), [(FORMS[1], ndjson), (FORMS[2], sse)])
def test_events_come_in_order_and_joined_deltas_are_the_response(
    serve: ServiceFactory, accept: str, read: Any
) -> None:
    url = serve(fake_checkpoint(says("虹!"))).url
    response = post(url, accept=accept, history=[["a", "b"]], seed=5, temperature=0.5)
    events = read(response)
    assert [e["event"] for e in events] == ["start", *["delta"] * 4, "end"]
    start, *deltas, end = events
    assert start == {
        "event": "start",
        "id": response.headers["X-Request-Id"],
        "model": "fake",
        "prompt_tokens": len("user:a<assistant:b<user:hi<assistant:"),
        "trimmed": {"messages": 0, "tokens": 0},
    }
    assert [d["delta"] for d in deltas] == ["", "", "虹", "!"]
    assert not any(d["finished"] for d in deltas)
    assert [d.get("cached_tokens") for d in deltas] == [0, None, None, None]
    assert end["finished"] is True
    assert end["response"] == "虹!"
    assert end["history"] == [["a", "b"], ["hi", "虹!"]]
    assert end["finish_reason"] == "stop"
    assert end["usage"] == {"prompt_tokens": 37, "completion_tokens": 4, "total_tokens": 41}
    assert end["seed"] == 5
    assert end["params"]["temperature"] == 0.5
    assert set(end["timings"]) == {"queue_ms", "ttft_ms", "tokens_per_second"}


def test_log_probabilities_come_with_each_delta_if_asked_for(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(says("ab"))).url
    _, *deltas, _ = ndjson(post(url, accept=FORMS[1], logprobs=2))
    assert [d["id"] for d in deltas] == [ord("a"), ord("b")]
    for delta in deltas:
        assert delta["logprob"] == pytest.approx(0.0, abs=1e-3), "the fake model has no doubts"
        assert delta["token"] == delta["delta"] == chr(delta["id"])
        chosen = {name: delta[name] for name in ("id", "token", "logprob")}
        assert delta["alternatives"][0] == chosen
        assert len(delta["alternatives"]) == 2


def test_chat_gives_the_same_reply_in_one_object(serve: ServiceFactory) -> None:
    answer = post(serve(fake_checkpoint(says("虹!"))).url, "/chat", max_new_tokens=3).json()
    assert answer == {
        "query": "hi",
        "response": "虹",
        "history": [["hi", "虹"]],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 18, "completion_tokens": 3, "total_tokens": 21},
    }


@pytest.mark.parametrize("accept", FORMS)
def test_each_token_reaches_the_reader_before_the_next_is_computed(
    serve: ServiceFactory, accept: str
) -> None:
    """The model waits, at each token, until the reader has seen the one before."""
    gate = Gate(says("abc"))
    url = serve(fake_checkpoint(gate)).url
    with raw_connection(url) as connection:
        send_request(connection, accept)
        for n, letter in enumerate(["a", "b", "c"], start=1):
            gate.allow()
            wanted = letter if accept == FORMS[0] else f'"delta":"{letter}"'
            read_until(connection, wanted.encode() + (b"\r\n" if accept == FORMS[0] else b""))
            assert gate.num_computed_tokens == n
        gate.allow()
        read_until(connection, b"0\r\n\r\n")


def test_a_waiting_stream_hears_its_place_and_keeps_the_connection_alive(
    serve: ServiceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_service.wire.HEARTBEAT_SECONDS", 0.01)
    gate = Gate(says("a"))
    url = serve(fake_checkpoint(gate), slots=1).url
    first = threading.Thread(target=post, args=(url, "/chat"))
    first.start()
    assert gate.arrived.acquire(timeout=TIMEOUT)
    with raw_connection(url) as connection:
        send_request(connection, FORMS[2])
        read_until(connection, b'data: {"event":"queue","position":1}\n\n')
        read_until(connection, b": still here\n\n")
        gate.allow(10)
        read_until(connection, b'"finish_reason":"stop"')
    first.join()


# Those who leave


@pytest.mark.parametrize("accept", FORMS)
def test_a_client_that_goes_away_stops_its_generation(serve: ServiceFactory, accept: str) -> None:
    gate = Gate(says("a" * 400))
    service = serve(fake_checkpoint(gate))
    with raw_connection(service.url) as connection:
        send_request(connection, accept, **{"X-Request-Id": "leaver"})
        gate.allow()
        read_until(connection, b"a")
        stream = service.engine._streams["leaver"]
    # The model stands in its second token now. It goes on only once the service has noticed.
    wait_until_abort_is_asked_for(service, "leaver")
    gate.allow(1000)
    assert post(service.url, "/chat", max_new_tokens=1).json()["response"] == "a"
    assert stream.request.finish_reason is FinishReason.ABORT
    assert len(stream.request.output_ids) <= 2


def wait_until_abort_is_asked_for(service: RunningService, request_id: str) -> None:
    engine = service.engine
    with engine._changed:
        request = engine._streams[request_id].request
        assert engine._changed.wait_for(lambda: request.abort_requested, TIMEOUT)


@pytest.mark.parametrize("path", ["/stream", "/chat"])
def test_a_client_that_goes_away_while_it_waits_is_never_computed(
    serve: ServiceFactory, path: str
) -> None:
    gate = Gate(says("ab"))
    service = serve(fake_checkpoint(gate), slots=1)
    first = threading.Thread(target=post, args=(service.url, "/chat"))
    first.start()
    assert gate.arrived.acquire(timeout=TIMEOUT)
    with raw_connection(service.url) as connection:
        body = b'{"query": "hi"}'
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: waiter\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        with service.engine._changed:
            there = service.engine._changed.wait_for(
                lambda: "waiter" in service.engine._streams, TIMEOUT
            )
            assert there
            waiter = service.engine._streams["waiter"]
    wait_until_abort_is_asked_for(service, "waiter")
    gate.allow(10)
    first.join()
    assert post(service.url, "/chat").json()["response"] == "ab"
    assert waiter.request.output_ids == []
    assert waiter.request.finish_reason is FinishReason.ABORT


def test_two_people_are_served_in_turn_and_each_gets_their_own(serve: ServiceFactory) -> None:
    def echo(ids: list[int]) -> int:
        prompt = bytes(i for i in ids if i < 256).decode()
        who = prompt.partition("user:")[2][0]
        return says(who * 5)(ids)

    url = serve(fake_checkpoint(echo)).url
    replies: dict[str, str] = {}

    def ask(who: str) -> None:
        replies[who] = post(url, query=who).text

    threads = [threading.Thread(target=ask, args=(who,)) for who in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {who: who * 5 for who in "abcdef"}


# Failures


def failing_after(tokens: int) -> Any:
    def next_id(ids: list[int]) -> int:
        text = bytes(i for i in ids if i < 256).decode()
        if text.endswith("assistant:" + "abcdef"[:tokens]) and "fail" in text:
            raise RuntimeError("boom")
        return says("abcdef")(ids)

    return next_id


def test_a_failing_prefill_is_a_true_500_in_plain_text_and_in_chat(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(failing_after(0))).url
    for path in ("/stream", "/chat"):
        response = post(url, path, query="fail")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "generation_failed"
        assert post(url, path).status_code == 200, "the next request is served"


def test_a_failure_in_mid_stream_never_looks_like_an_end(serve: ServiceFactory) -> None:
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


def test_one_more_than_the_queue_holds_gets_429(serve: ServiceFactory) -> None:
    gate = Gate(says("a"))
    service = serve(fake_checkpoint(gate), max_waiting=1, slots=1)
    threads = []
    for waiting in range(2):
        threads.append(threading.Thread(target=post, args=(service.url, "/chat")))
        threads[-1].start()
        if not waiting:
            assert gate.arrived.acquire(timeout=TIMEOUT)
    with service.engine._changed:
        assert service.engine._changed.wait_for(lambda: service.engine._batch.waiting, TIMEOUT)
    for accept in FORMS:
        refused = post(service.url, accept=accept)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    gate.allow(10)
    for thread in threads:
        thread.join()


def test_a_request_id_is_the_clients_own_if_well_formed_and_free(serve: ServiceFactory) -> None:
    gate = Gate(says("a"))
    url = serve(fake_checkpoint(gate)).url
    with raw_connection(url) as connection:
        send_request(connection, FORMS[1], **{"X-Request-Id": "mine-1"})
        read_until(connection, b"mine-1")
        assert gate.arrived.acquire(timeout=TIMEOUT)
        taken = requests.post(
            url + "/stream", json={"query": "a"}, headers={"X-Request-Id": "mine-1"}
        )
        assert (taken.status_code, taken.json()["error"]["request_id"]) == (409, "mine-1")
        gate.allow(10)
        read_until(connection, b"0\r\n\r\n")
    odd = requests.get(url + "/health", headers={"X-Request-Id": "a b<script>"})
    assert odd.headers["X-Request-Id"] != "a b<script>"


def assert_error_shape(response: requests.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert len(response.content) < 2048
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["X-Request-Id"]
    assert error["message"]
    return error


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from support.service import running_service

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
def test_every_route_answers_errors_in_the_same_shape(
    url: str, method: str, path: str, status: int
) -> None:
    assert_error_shape(requests.request(method, url + path, timeout=TIMEOUT), status)


@pytest.mark.parametrize("path", ["/stream", "/chat"])
def test_silly_input_is_answered_and_the_next_request_works(url: str, path: str) -> None:
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


def test_the_index_tells_what_a_page_needs(url: str) -> None:
    index = requests.get(url, timeout=TIMEOUT).json()
    assert (index["message"], index["success"]) == ("started", True)
    assert index["model"] == "fake"
    assert index["context_length"] == 100
    assert index["defaults"]["do_sample"] is False
    assert index["bounds"]["temperature"]["maximum"] == 5
    assert requests.get(url + "/health", timeout=TIMEOUT).json() == {"status": "ok"}
    assert requests.post(url + "/clear", timeout=TIMEOUT).json() == {"success": True}


def test_health_tells_when_the_engine_is_gone(serve: ServiceFactory) -> None:
    service = serve(fake_checkpoint(says("a")))
    service.engine.close()
    assert requests.get(service.url + "/health", timeout=TIMEOUT).status_code == 503
    assert_error_shape(post(service.url), 503)


def test_every_error_of_the_project_has_an_answer_and_none_is_long() -> None:
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


def test_a_history_that_fills_the_context_is_trimmed_and_the_start_event_says_so(
    serve: ServiceFactory,
) -> None:
    url = serve(fake_checkpoint(says("ok"), context_length=200)).url
    history = [["x" * 40, "y" * 40]] * 5
    start, *_, end = ndjson(post(url, accept=FORMS[1], history=history))
    assert start["trimmed"]["messages"] % 2 == 0
    assert start["trimmed"]["messages"] > 0
    assert start["prompt_tokens"] + start["trimmed"]["tokens"] > 200
    assert end["response"] == "ok"
    assert end["history"] == [*history, ["hi", "ok"]], "the client keeps all of it"


def test_a_history_that_may_not_be_cut_is_refused_with_both_numbers(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(says("ok"), context_length=100)).url
    history = [["a" * 30, "b" * 30]] * 5
    assert post(url, "/chat", history=history).status_code == 200
    error = assert_error_shape(post(url, "/chat", history=history, truncate=False), 400)
    assert error["code"] == "context_length_exceeded"
    assert "403 tokens" in error["message"]
    assert "100" in error["message"]
    assert post(url, "/chat", truncate=False).status_code == 200


# Stopping by name


@pytest.mark.parametrize("accept", FORMS)
def test_a_stop_ends_the_reply_as_far_as_it_is(serve: ServiceFactory, accept: str) -> None:
    gate = Gate(says("abcdef"))
    service = serve(fake_checkpoint(gate))
    received = []
    with raw_connection(service.url) as connection:
        send_request(connection, accept, **{"X-Request-Id": "mine"})
        gate.allow(2)
        received.append(read_until(connection, b"b"))
        stopped: list[Any] = []
        stop = threading.Thread(
            target=lambda: stopped.append(post(service.url, "/stop/mine").json())
        )
        stop.start()
        wait_until_abort_is_asked_for(service, "mine")
        gate.allow(100)
        stop.join()
        received.append(read_until(connection, b"0\r\n\r\n"))
    assert stopped[0]["id"] == "mine"
    assert stopped[0]["response"] in ("ab", "abc")
    assert stopped[0]["finish_reason"] == "abort"
    assert stopped[0]["usage"]["completion_tokens"] == len(stopped[0]["response"])
    if accept != "text/plain":
        assert b'"finish_reason":"abort"' in b"".join(received)


def test_a_stop_reaches_one_who_waits_and_another_name_is_404(serve: ServiceFactory) -> None:
    gate = Gate(says("ab"))
    service = serve(fake_checkpoint(gate), slots=1)
    first = threading.Thread(target=post, args=(service.url, "/chat"))
    first.start()
    assert gate.arrived.acquire(timeout=TIMEOUT)
    assert_error_shape(post(service.url, "/stop/waiter"), 404)
    with raw_connection(service.url) as connection:
        send_request(connection, FORMS[1], **{"X-Request-Id": "waiter"})
        read_until(connection, b'"event":"queue"')
        stop = threading.Thread(target=post, args=(service.url, "/stop/waiter"))
        stop.start()
        wait_until_abort_is_asked_for(service, "waiter")
        gate.allow(100)
        end = read_until(connection, b"0\r\n\r\n")
        stop.join()
    assert b'"response":""' in end
    assert b'"finish_reason":"abort"' in end
    first.join()
    assert_error_shape(post(service.url, "/stop/waiter"), 404)


def test_several_replies_are_stopped_together(serve: ServiceFactory) -> None:
    gate = Gate(says("abc"))
    service = serve(fake_checkpoint(gate))
    answers: list[Any] = []
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 3}

    def ask() -> None:
        url = service.url + "/v1/chat/completions"
        headers = {"X-Request-Id": "three"}
        answers.append(requests.post(url, json=body, headers=headers, timeout=TIMEOUT).json())

    asking = threading.Thread(target=ask)
    asking.start()
    assert gate.arrived.acquire(timeout=TIMEOUT)
    stop = threading.Thread(target=post, args=(service.url, "/stop/three"))
    stop.start()
    wait_until_abort_is_asked_for(service, "three#2")
    gate.allow(1000)
    stop.join()
    asking.join()
    assert {c["finish_reason"] for c in answers[0]["choices"]} == {"stop"}
    assert sum(len(c["message"]["content"]) for c in answers[0]["choices"]) <= 3


# Those who do not read


def test_one_who_stops_reading_is_dropped_and_holds_nobody_up(
    serve: ServiceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_service.server.SILENT_READER_MS", 500)
    monkeypatch.setattr("stream_service.server.UNSENT_BYTES", 1)
    bind = server.bind

    def bind_with_little_room(host: str, port: int) -> socket.socket:
        listening = bind(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # inherited
        return listening

    monkeypatch.setattr(server, "bind", bind_with_little_room)
    service = serve(fake_checkpoint(says("x" * 1900), context_length=2000), slots=2)
    silent = []
    for number in range(2):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        where = urlsplit(service.url)
        connection.connect((where.hostname, where.port))
        send_request(connection, FORMS[1], **{"X-Request-Id": f"silent-{number}"})
        silent.append(connection)
    assert post(service.url, "/chat", max_new_tokens=3).json()["response"] == "xxx"
    dispatcher = service.app.extensions["dispatcher"]
    while dispatcher._admitted:  # until the system has given the readers up
        assert post(service.url, "/chat", max_new_tokens=1).status_code == 200
    for connection in silent:
        connection.close()

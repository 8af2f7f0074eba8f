"""The forms of an answer over real HTTP, with a model that the test controls."""

import threading
from typing import Any

import pytest
import requests
from support.fakes import Gate, fake_checkpoint, says
from support.http import (
    FORMS,
    assert_error_shape,
    ndjson,
    post,
    raw_connection,
    read_until,
    send_request,
    sse,
)
from support.service import ServiceFactory
from support.waiting import wait_for


@pytest.mark.parametrize("accept", [None, "*/*", "text/plain", "text/*"])
def test_a_plain_text_answer_holds_only_the_reply(serve: ServiceFactory, accept: str) -> None:
    response = post(serve(fake_checkpoint(says("彩虹 🌈\n"))).url, accept=accept)
    assert response.content.decode() == "彩虹 🌈\n"
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert response.headers["Transfer-Encoding"] == "chunked"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Accel-Buffering"] == "no"


@pytest.mark.parametrize(("accept", "read"), [(FORMS[1], ndjson), (FORMS[2], sse)])
def test_events_come_in_order_and_their_joined_deltas_are_the_response(
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


def test_each_delta_has_log_probabilities_if_requested(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(says("ab"))).url
    _, *deltas, _ = ndjson(post(url, accept=FORMS[1], logprobs=2))
    assert [d["id"] for d in deltas] == [ord("a"), ord("b")]
    for delta in deltas:
        assert delta["logprob"] == pytest.approx(0.0, abs=1e-3), "the fake model is certain"
        assert delta["token"] == delta["delta"] == chr(delta["id"])
        chosen = {name: delta[name] for name in ("id", "token", "logprob")}
        assert delta["alternatives"][0] == chosen
        assert len(delta["alternatives"]) == 2


def test_the_chat_route_gives_the_whole_reply_in_one_object(serve: ServiceFactory) -> None:
    answer = post(serve(fake_checkpoint(says("虹!"))).url, "/chat", max_new_tokens=3).json()
    assert answer == {
        "query": "hi",
        "response": "虹",
        "history": [["hi", "虹"]],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 18, "completion_tokens": 3, "total_tokens": 21},
    }


@pytest.mark.parametrize("accept", FORMS)
def test_each_token_reaches_the_client_before_the_next_is_computed(
    serve: ServiceFactory, accept: str
) -> None:
    """The model waits before each token until the client has received the previous one."""
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


def test_a_waiting_stream_gets_its_queue_position_and_heartbeats(
    serve: ServiceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_service.wire.HEARTBEAT_SECONDS", 0.01)
    gate = Gate(says("a"))
    url = serve(fake_checkpoint(gate), slots=1).url
    first = threading.Thread(target=post, args=(url, "/chat"))
    first.start()
    wait_for(gate.arrived)
    with raw_connection(url) as connection:
        send_request(connection, FORMS[2])
        read_until(connection, b'data: {"event":"queue","position":1}\n\n')
        read_until(connection, b": still here\n\n")
        gate.allow(10)
        read_until(connection, b'"finish_reason":"stop"')
    wait_for(first)


def test_concurrent_requests_each_get_their_own_reply(serve: ServiceFactory) -> None:
    def echo(ids: list[int]) -> int:
        prompt = bytes(i for i in ids if i < 256).decode()
        name = prompt.partition("user:")[2][0]
        return says(name * 5)(ids)

    url = serve(fake_checkpoint(echo)).url
    replies: dict[str, str] = {}

    def ask(name: str) -> None:
        replies[name] = post(url, query=name).text

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        wait_for(thread)
    assert replies == {name: name * 5 for name in "abcdef"}


def test_a_client_may_choose_any_well_formed_and_unused_request_id(serve: ServiceFactory) -> None:
    gate = Gate(says("a"))
    url = serve(fake_checkpoint(gate)).url
    with raw_connection(url) as connection:
        send_request(connection, FORMS[1], **{"X-Request-Id": "mine-1"})
        read_until(connection, b"mine-1")
        wait_for(gate.arrived)
        taken = requests.post(
            url + "/stream", json={"query": "a"}, headers={"X-Request-Id": "mine-1"}
        )
        assert (taken.status_code, taken.json()["error"]["request_id"]) == (409, "mine-1")
        gate.allow(10)
        read_until(connection, b"0\r\n\r\n")
    odd = requests.get(url + "/health", headers={"X-Request-Id": "a b<script>"})
    assert odd.headers["X-Request-Id"] != "a b<script>"


def test_a_long_history_is_trimmed_and_the_start_event_says_so(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(says("ok"), context_length=200)).url
    history = [["x" * 40, "y" * 40]] * 5
    start, *_, end = ndjson(post(url, accept=FORMS[1], history=history))
    assert start["trimmed"]["messages"] % 2 == 0
    assert start["trimmed"]["messages"] > 0
    assert start["prompt_tokens"] + start["trimmed"]["tokens"] > 200
    assert end["response"] == "ok"
    assert end["history"] == [*history, ["hi", "ok"]], "the returned history is complete"


def test_truncate_false_rejects_a_long_history_with_both_lengths(serve: ServiceFactory) -> None:
    url = serve(fake_checkpoint(says("ok"), context_length=100)).url
    history = [["a" * 30, "b" * 30]] * 5
    assert post(url, "/chat", history=history).status_code == 200
    error = assert_error_shape(post(url, "/chat", history=history, truncate=False), 400)
    assert error["code"] == "context_length_exceeded"
    assert "403 tokens" in error["message"]
    assert "100" in error["message"]
    assert post(url, "/chat", truncate=False).status_code == 200

"""The service aborts a request when its client leaves, stops it, or stops reading."""

import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from support.fakes import Gate, fake_checkpoint, says
from support.http import (
    FORMS,
    assert_error_shape,
    post,
    raw_connection,
    read_until,
    send_request,
)
from support.service import ServiceFactory
from support.waiting import TIMEOUT, wait_for

from stream_generator.request import FinishReason
from stream_service import server


@pytest.mark.parametrize("accept", FORMS)
def test_a_client_that_leaves_aborts_its_request(serve: ServiceFactory, accept: str) -> None:
    gate = Gate(says("a" * 400))
    service = serve(fake_checkpoint(gate))
    with raw_connection(service.url) as connection:
        send_request(connection, accept, **{"X-Request-Id": "leaving"})
        gate.allow()
        read_until(connection, b"a")
        request = service.request("leaving")
    # The model waits in its second token until the service has noticed that the client left.
    service.wait_for_abort(request)
    gate.allow(1000)
    assert post(service.url, "/chat", max_new_tokens=1).json()["response"] == "a"
    assert request.finish_reason is FinishReason.ABORT
    assert len(request.output_ids) <= 2


@pytest.mark.parametrize("path", ["/stream", "/chat"])
def test_a_waiting_request_whose_client_leaves_is_never_computed(
    serve: ServiceFactory, path: str
) -> None:
    gate = Gate(says("ab"))
    service = serve(fake_checkpoint(gate), slots=1)
    first = threading.Thread(target=post, args=(service.url, "/chat"))
    first.start()
    wait_for(gate.arrived)
    with raw_connection(service.url) as connection:
        body = b'{"query": "hi"}'
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: waiter\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        waiter = service.request("waiter")
    service.wait_for_abort(waiter)
    gate.allow(10)
    wait_for(first)
    assert post(service.url, "/chat").json()["response"] == "ab"
    assert waiter.output_ids == []
    assert waiter.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("accept", FORMS)
def test_stop_aborts_a_reply_and_returns_its_text_so_far(
    serve: ServiceFactory, accept: str
) -> None:
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
        service.wait_for_abort(service.request("mine"))
        gate.allow(100)
        wait_for(stop)
        received.append(read_until(connection, b"0\r\n\r\n"))
    assert stopped[0]["id"] == "mine"
    assert stopped[0]["response"] in ("ab", "abc")
    assert stopped[0]["finish_reason"] == "abort"
    assert stopped[0]["usage"]["completion_tokens"] == len(stopped[0]["response"])
    if accept != "text/plain":
        assert b'"finish_reason":"abort"' in b"".join(received)


def test_stop_aborts_a_waiting_request_and_rejects_unknown_ids(serve: ServiceFactory) -> None:
    gate = Gate(says("ab"))
    service = serve(fake_checkpoint(gate), slots=1)
    first = threading.Thread(target=post, args=(service.url, "/chat"))
    first.start()
    wait_for(gate.arrived)
    assert_error_shape(post(service.url, "/stop/waiter"), 404)
    with raw_connection(service.url) as connection:
        send_request(connection, FORMS[1], **{"X-Request-Id": "waiter"})
        read_until(connection, b'"event":"queue"')
        stop = threading.Thread(target=post, args=(service.url, "/stop/waiter"))
        stop.start()
        service.wait_for_abort(service.request("waiter"))
        gate.allow(100)
        end = read_until(connection, b"0\r\n\r\n")
        wait_for(stop)
    assert b'"response":""' in end
    assert b'"finish_reason":"abort"' in end
    wait_for(first)
    assert_error_shape(post(service.url, "/stop/waiter"), 404)


def test_stop_aborts_all_replies_of_a_request(serve: ServiceFactory) -> None:
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
    wait_for(gate.arrived)
    stop = threading.Thread(target=post, args=(service.url, "/stop/three"))
    stop.start()
    service.wait_for_abort(service.request("three#2"))
    gate.allow(1000)
    wait_for(stop)
    wait_for(asking)
    assert {c["finish_reason"] for c in answers[0]["choices"]} == {"stop"}
    assert sum(len(c["message"]["content"]) for c in answers[0]["choices"]) <= 3


def test_a_client_that_stops_reading_is_disconnected_and_delays_no_other_client(
    serve: ServiceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream_service.server.SILENT_READER_MS", 500)
    monkeypatch.setattr("stream_service.server.UNSENT_BYTES", 1)
    bind = server.bind

    def bind_with_a_small_buffer(host: str, port: int) -> socket.socket:
        listening = bind(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return listening

    monkeypatch.setattr(server, "bind", bind_with_a_small_buffer)
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

    def silent_clients_are_gone_and_others_are_served() -> bool:
        assert post(service.url, "/chat", max_new_tokens=1).status_code == 200
        return service.has_no_open_request

    wait_for(silent_clients_are_gone_and_others_are_served)
    for connection in silent:
        connection.close()

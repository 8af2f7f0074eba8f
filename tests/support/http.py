"""Requests to the service, through the requests library and through a socket."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import requests
from support.waiting import TIMEOUT

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
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT) as connection:
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


def assert_error_shape(response: requests.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert len(response.content) < 2048
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["X-Request-Id"]
    assert error["message"]
    return error

"""Hostile or broken requests never give a 5xx status, and the next request works."""

import contextlib
import itertools
import json
import random
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from flask.testing import FlaskClient
from support.engines import engine_of
from support.fakes import fake_checkpoint, says
from support.service import RunningService, running_service
from support.waiting import TIMEOUT

from stream_service.app import create_app
from stream_service.schemas import ChatCompletionRequest, CompletionRequest, StreamRequest

CHAT = [{"role": "user", "content": "hi"}]
ROUTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/stream": (StreamRequest, {"query": "hi"}),
    "/chat": (StreamRequest, {"messages": CHAT}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": CHAT}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi"}),
}
NEVER_VALID: list[bytes] = [
    b"", b" ", b"{", b"}", b"[]", b"null", b"true", b"1", b'"hi"', b"nonsense", b"\x00", b"\xff",
    b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000,
    b"{" * 100_000, b'[{"a":' * 30_000, b"9" * 5000, b'{"query":"hi"}{"query":"hi"}',
    b'{"query":"hi",}', b"{'query':'hi'}", b'{"query":"hi"', b'{"query":"\x01"}', b'{"\\u00',
    b'{"query":"hi","query":"hi"}', b'{"query":NaN}', b'{"query":"hi","seed":Infinity}',
    b'{"query":"hi","temperature":-Infinity}', b'{"query":"hi","seed":' + b"9" * 5000 + b"}",
    b'{"query":"hi","temperature":1e999}', b'{"query":"hi","temperature":-1e999}',
    b'{"query":"hi","temperature":1e-999999999999}x', b'{"query":"\\ud800"}',
    b'{"query":"\\udfff\\ud800"}', b'{"\\ud800":1,"query":"hi"}', b'{"query":"hi","\\u0000":1}',
    b"{" + b"".join(b'"%d":1,' % n for n in range(300_000)) + b'"7":1}',
    b'{"' + b"k" * 3_000_000 + b'":1}', b'{"prompt":[' + b"-1," * 500_000 + b"-1]}",
    b'{"__class__":1,"query":"hi"}', b'{"model_config":1,"query":"hi"}', b'{"":1,"query":"hi"}',
    b'{"query":"\xc3\x28"}', b'{"query":"\xed\xa0\x80"}', b'{"query":"\xf8\x88\x80\x80\x80"}',
    '{"query":"hi"}'.encode("utf-16"), '{"query":"hi"}'.encode("utf-32"),
    b'{"messages":[{"role":"user","content":"hi","chat_template":"{{ 1 }}"}]}',
    b'{"query":"hi","chat_template":"{% for i in range(10**9) %}{% endfor %}"}',
    b'{"query":"hi","chat_template_kwargs":{}}', b'{"query":"hi","trust_remote_code":true}',
]  # fmt: skip
WRONG_VALUES: list[Any] = [
    "", "x", "0", "1.5", "NaN", -1, -(2**63), 2**63, 2**64, 10**400, 0, 0.5, -0.0, 1e308, -1e308,
    5e-324, True, False, [], [[]], [[[]]], [None], [1], ["a", 1], [{}], {}, {"a": 1}, {"a": {}},
    {"1": "x"}, {"-1": 1}, {"99999999": 1}, {"1": 1e9}, [""], [0.5], [-1], [10**30], [True],
    ["\x00"], "\x00", "\u202e", "a" * 5000, ["a"] * 2000, {str(i): 1 for i in range(1500)},
    [["a"]], [["a", "b", "c"]], [["a", None]], [{"role": "user"}], [{"content": "x"}],
    [{"role": "root", "content": "x"}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": ["user"], "content": "x"}],
    [{"role": "assistant", "content": "x"}, {"role": "system", "content": ""}],
]  # fmt: skip


def corpus(path: str) -> Iterator[bytes]:
    """Bodies for one route: broken JSON, and each field with each wrong value."""
    model, good = ROUTES[path]
    yield from NEVER_VALID
    for name, value in itertools.product(model.model_fields, WRONG_VALUES):
        yield json.dumps({**good, "max_tokens": 2, name: value}).encode()
    for name in model.model_fields:
        yield json.dumps({**good, name.upper(): 1}).encode()
        yield json.dumps({**good, name + "\u0000": 1}).encode()
        yield json.dumps({name: None}).encode()


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    engine = engine_of(fake_checkpoint(says("ok"), context_length=100)).start()
    yield create_app(engine).test_client()
    engine.close()


def check(client: FlaskClient, path: str, body: bytes, content_type: str) -> int:
    response = client.post(path, data=body, content_type=content_type, buffered=True)
    assert response.status_code < 500, body[:200]
    if response.status_code != 200:
        (error,) = response.get_json().values()
        assert error["message"], body[:200]
        assert len(response.data) < 2048, body[:200]
        assert response.headers["X-Request-Id"] == error["request_id"]
    return response.status_code


def serves_a_valid_request(client: FlaskClient, path: str) -> bool:
    response = client.post(path, json=ROUTES[path][1], buffered=True)
    # The fake model says "ok" only in chats.
    return response.status_code == 200 and (b"ok" in response.data or path == "/v1/completions")


def test_the_corpus_of_bad_bodies_has_more_than_4000_entries() -> None:
    assert sum(len(list(corpus(path))) for path in ROUTES) > 4000


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_survives_bad_bodies(client: FlaskClient, path: str) -> None:
    for body in NEVER_VALID:
        assert check(client, path, body, "application/json") == 400, body[:100]
    statuses = {check(client, path, body, "application/json") for body in corpus(path)}
    assert statuses <= {200, 400, 404}
    assert 400 in statuses
    assert serves_a_valid_request(client, path)


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_survives_randomly_damaged_bodies(client: FlaskClient, path: str) -> None:
    rng = random.Random(path)
    good = json.dumps({**ROUTES[path][1], "max_tokens": 2, "stop": ["x"], "seed": 7}).encode()
    for _ in range(1500):
        body = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(body))
            match rng.randrange(3):
                case 0:
                    body[place] = rng.randrange(256)
                case 1:
                    del body[place]
                case 2:
                    body[place:place] = rng.choice([b'"', b"{", b"[", b"\\", b"1e9", b"\xff", b","])
        check(client, path, bytes(body), "application/json")
    assert serves_a_valid_request(client, path)


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/jsonx", "application/json\x00", "x" * 5000, "application/xml"],
)  # fmt: skip
def test_a_wrong_content_type_gives_status_415(client: FlaskClient, content_type: str) -> None:
    for path in ROUTES:
        assert check(client, path, b'{"query":"hi"}', content_type) == 415
        assert serves_a_valid_request(client, path)


# Bytes that one server might read as one request, and another server as two


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(fake_checkpoint(says("ok"))) as running:
        yield running


BODY = b'{"query":"hi"}'
JSON = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKED_BODY = b"e\r\n" + BODY + b"\r\n0\r\n\r\n"
AMBIGUOUS_REQUESTS = {
    "length and chunked": (LENGTH + CHUNKED, CHUNKED_BODY),
    "chunked and length": (CHUNKED + LENGTH, CHUNKED_BODY),
    "chunked and length 0": (CHUNKED + b"Content-Length: 0\r\n", CHUNKED_BODY),
    "two lengths": (LENGTH + b"Content-Length: 5\r\n", BODY),
    "two equal lengths": (LENGTH + LENGTH, BODY),
    "a list of lengths": (b"Content-Length: 14, 14\r\n", BODY),
    "a length with a sign": (b"Content-Length: +14\r\n", BODY),
    "a negative length": (b"Content-Length: -1\r\n", BODY),
    "a length in hexadecimal": (b"Content-Length: 0xe\r\n", BODY),
    "a length with an underscore": (b"Content-Length: 1_4\r\n", BODY),
    "a length that is no number": (b"Content-Length: fourteen\r\n", BODY),
    "a length in other digits": ("Content-Length: １４\r\n".encode(), BODY),
    "chunked twice": (CHUNKED + CHUNKED, CHUNKED_BODY),
    "chunked, and identity": (b"Transfer-Encoding: chunked, identity\r\n", CHUNKED_BODY),
    "an unknown encoding": (b"Transfer-Encoding: xchunked\r\n", CHUNKED_BODY),
    "a quoted encoding": (b'Transfer-Encoding: "chunked"\r\n', CHUNKED_BODY),
    "gzip": (b"Transfer-Encoding: gzip, chunked\r\n", CHUNKED_BODY),
    "a vertical tab in the encoding": (b"Transfer-Encoding: \x0bchunked\r\n", CHUNKED_BODY),
    "white space before the colon": (b"Content-Length : 14\r\n", BODY),
    "a folded header": (b"Content-Length:\r\n 14\r\n", BODY),
    "a header with a bare CR": (b"X: a\rContent-Length: 14\r\n", BODY),
    "a header with a bare LF": (b"X: a\nContent-Length: 14\r\n", BODY),
    "a header with NUL": (b"X: a\x00b\r\n" + LENGTH, BODY),
    "a header without a name": (b": a\r\n" + LENGTH, BODY),
    "a header without a colon": (b"Content-Length\r\n", BODY),
    "a second host": (b"Host: other\r\n" + LENGTH, BODY),
    "a chunk size with a sign": (CHUNKED, b"+e\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk size with 0x": (CHUNKED, b"0xe\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk size with an underscore": (CHUNKED, b"0_e\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk size that is no number": (CHUNKED, b"xyz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a negative chunk size": (CHUNKED, b"-1\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk longer than its size": (CHUNKED, b"3\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk ended by LF": (CHUNKED, b"e\r\n" + BODY + b"\n0\r\n\r\n"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS_REQUESTS)
def test_an_ambiguous_request_is_rejected_and_the_bytes_after_it_are_ignored(
    service: RunningService, kind: str
) -> None:
    headers, body = AMBIGUOUS_REQUESTS[kind]
    where = urlsplit(service.url)
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=TIMEOUT) as connection:
        connection.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\n" + JSON + headers + b"\r\n")
        connection.sendall(body + smuggled)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # the service left bytes unread
            while data := connection.recv(4096):
                answer += data
    first = answer.partition(b"\r\n")[0]
    assert first.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501", b"HTTP/1.0 400")), answer
    assert answer.count(b"HTTP/1.") == 1, answer
    assert b'{"error"' in answer


def test_the_body_limit_holds_for_plain_and_chunked_bodies(service: RunningService) -> None:
    where = urlsplit(service.url)
    over = 5 * 1024 * 1024
    for headers, body in (
        (b"Content-Length: %d\r\n" % over, b""),
        (CHUNKED, b"%x\r\n" % over + b"a" * over),
    ):
        with socket.create_connection((where.hostname, where.port), timeout=TIMEOUT) as connection:
            connection.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\n" + JSON + headers + b"\r\n")
            answer = b""
            # The service answers before it has read the whole body.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(body)
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(4096):
                    answer += data
        assert answer.startswith(b"HTTP/1.1 413"), answer[:100]


def test_a_thousand_idle_connections_do_not_block_a_request() -> None:
    with running_service(fake_checkpoint(says("ok"))) as service, contextlib.ExitStack() as stack:
        where = urlsplit(service.url)
        for number in range(1100):
            connection = stack.enter_context(
                socket.create_connection((where.hostname, where.port), timeout=TIMEOUT)
            )
            if number % 2:
                connection.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-")
        body = {"query": "hi"}
        assert requests.post(f"{service.url}/chat", json=body, timeout=TIMEOUT).status_code == 200

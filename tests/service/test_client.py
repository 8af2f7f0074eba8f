"""`StreamClient`: its replies, its errors, and how it tells a complete reply from a broken one."""

import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from support.answers import DELTA, HEAD, START, answers, chunk
from support.fakes import Gate, fake_checkpoint, says
from support.service import ServiceFactory

from stream_generator.request import FinishReason
from stream_service.client import StreamClient, StreamError


def test_the_client_yields_each_delta_before_the_next_is_computed(serve: ServiceFactory) -> None:
    gate = Gate(says("ab"))
    client = StreamClient(serve(fake_checkpoint(gate)).url)
    reply = client.stream("hi", max_new_tokens=5)
    for n, expected in enumerate("ab", start=1):
        gate.allow()
        assert next(reply) == expected
        assert gate.num_computed_tokens == n
    gate.allow()
    assert list(reply) == []
    assert reply.text == "ab"
    assert reply.start["model"] == "fake"
    assert reply.end["finish_reason"] == "stop"
    assert reply.end["usage"]["completion_tokens"] == 2


def test_the_client_can_yield_events_in_place_of_text(serve: ServiceFactory) -> None:
    reply = StreamClient(serve(fake_checkpoint(says("ab"))).url).stream("hi", logprobs=1)
    events = list(reply.events())
    assert [e["event"] for e in events if e["event"] != "queue"] == ["start", *["delta"] * 2, "end"]
    assert [e["token"] for e in events if e["event"] == "delta"] == ["a", "b"]
    assert (events[0], events[-1], reply.text) == (reply.start, reply.end, "ab")


def test_about_describes_the_service_and_raises_for_any_other_server(serve: ServiceFactory) -> None:
    about = StreamClient(serve(fake_checkpoint(says("a"))).url).about()
    assert (about["model"], about["bounds"]["top_p"]["maximum"]) == ("fake", 1)
    with answers(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi") as url:
        with pytest.raises(StreamError, match="not this service"):
            StreamClient(url).about()


def test_client_chat_takes_messages_and_returns_the_whole_reply(serve: ServiceFactory) -> None:
    client = StreamClient(serve(fake_checkpoint(says("ab"))).url + "/")
    assert client.chat([{"role": "user", "content": "hi"}])["response"] == "ab"


@pytest.mark.parametrize("way", ["with", "close"])
def test_closing_a_reply_of_the_client_aborts_its_request(serve: ServiceFactory, way: str) -> None:
    gate = Gate(says("a" * 400))
    service = serve(fake_checkpoint(gate))
    reply = StreamClient(service.url).stream("hi")
    gate.allow()
    assert next(reply) == "a"
    (request,) = service.engine.requests
    if way == "with":
        with reply:
            pass
    else:
        reply.close()
        reply.close()
    service.wait_for_abort(request)
    gate.allow(1000)
    assert StreamClient(service.url).chat("hi", max_new_tokens=1)["response"] == "a"
    assert request.finish_reason is FinishReason.ABORT


def test_client_stream_raises_at_once_for_a_rejected_request(serve: ServiceFactory) -> None:
    client = StreamClient(serve(fake_checkpoint(says("a"))).url)
    with pytest.raises(StreamError, match="did you mean temperature") as error:
        client.stream("hi", temprature=1)
    assert (error.value.status, error.value.param) == (400, "temprature")
    assert error.value.request_id


def test_the_client_raises_an_error_event_with_the_text_so_far(serve: ServiceFactory) -> None:
    def next_id(ids: list[int]) -> int:
        if bytes(ids[-2:]) == b"ab":
            raise RuntimeError
        return says("abc")(ids)

    reply = StreamClient(serve(fake_checkpoint(next_id)).url).stream("hi")
    assert [next(reply), next(reply)] == ["a", "b"]
    with pytest.raises(StreamError, match="RuntimeError") as error:
        next(reply)
    assert (error.value.text, error.value.code) == ("ab", "generation_failed")


@pytest.mark.parametrize(
    "data",
    [
        HEAD + START + DELTA,  # cut before the final chunk
        HEAD + START + DELTA + b"0\r\n\r\n",  # a final chunk, but no "end" event
        HEAD + START + DELTA + b"30\r\n{half",  # cut inside a chunk
        HEAD + START + DELTA + chunk('{"event": nonsense}\n') + b"0\r\n\r\n",
    ],
    ids=["no final chunk", "no end", "inside a chunk", "not JSON"],
)
def test_a_cut_stream_never_looks_complete_to_the_client(data: bytes) -> None:
    with answers(data) as url:
        reply = StreamClient(url).stream("hi")
        received = []
        with pytest.raises(StreamError, match="ended before the reply") as error:
            received += iter(lambda: next(reply), None)
        assert error.value.text == "abc"


def test_the_client_reports_an_unreachable_or_wrong_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    with pytest.raises(StreamError, match="cannot reach"):
        StreamClient(f"http://127.0.0.1:{free}").stream("hi")
    with answers(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno") as url:
        with pytest.raises(StreamError, match="status 502"):
            StreamClient(url).stream("hi")
    with pytest.raises(StreamError, match="failed"):
        StreamClient("nonsense").stream("hi")


def test_importing_the_client_loads_neither_flask_nor_torch() -> None:
    script = (
        "import sys, stream_service.client;"
        "print([m for m in ('flask', 'torch', 'transformers', 'pydantic') if m in sys.modules])"
    )
    result: Any = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_client_uses_no_proxy_for_loopback_addresses(
    serve: ServiceFactory, unreachable_proxy: None
) -> None:
    url = serve(fake_checkpoint(says("abc"))).url
    for address in (url, url.replace("127.0.0.1", "localhost")):
        assert "".join(StreamClient(address).stream("hi")) == "abc"
    with pytest.raises(StreamError, match="cannot reach"):
        StreamClient("http://llm.example").about()


def test_the_client_bypasses_a_proxy_without_changing_the_environment(
    serve: ServiceFactory, unreachable_proxy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other threads read the environment at the same time."""

    class Watched(dict[str, str]):
        def __setitem__(self, key: str, value: str) -> None:
            pytest.fail(f"{key} was set")

    client = StreamClient(serve(fake_checkpoint(says("abc"))).url)
    with monkeypatch.context() as within:
        within.setattr("os.environ", Watched(os.environ))
        assert "".join(client.stream("hi")) == "abc"

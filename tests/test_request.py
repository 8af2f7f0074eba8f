"""`Request` decides how a reply ends."""

from typing import Any

from support.fakes import END, fake_checkpoint, says

from stream_generator.errors import GenerationFailed
from stream_generator.request import Choice, FinishReason, Request
from stream_generator.sampling_params import SamplingParams

CHECKPOINT = fake_checkpoint(says(""), context_length=100)


def new_request(prompt: int = 10, **params: Any) -> Request:
    return CHECKPOINT.new_request([1] * prompt, SamplingParams(**params), request_id="x")


def append_all(request: Request, data: bytes) -> list[str]:
    return [request.append(Choice(i)).delta for i in data]


def test_an_end_id_finishes_a_request_and_is_neither_shown_nor_counted() -> None:
    request = new_request()
    assert append_all(request, b"hi") == ["h", "i"]
    last = request.append(Choice(END))
    assert (last.delta, last.choice, last.finish_reason) == ("", None, FinishReason.STOP)
    assert (request.text, len(request.output_ids)) == ("hi", 2)


def test_held_back_text_comes_with_the_last_output_except_after_an_abort() -> None:
    request = new_request(stop="abc")
    assert append_all(request, b"xab") == ["x", "", ""]
    assert request.append(Choice(END)).delta == "ab"
    request = new_request(stop="abc", max_new_tokens=3)
    assert append_all(request, b"xab")[-1] == "ab"
    assert request.finish_reason is FinishReason.LENGTH
    request = new_request()
    append_all(request, b"x\xe4\xbd")
    assert request.abort().delta == "", "the client has left"
    assert request.text == "x"


def test_a_stop_string_in_the_last_bytes_takes_precedence_over_the_length() -> None:
    request = new_request(stop="\ufffd", max_new_tokens=2)
    append_all(request, b"x\xe4")
    assert request.finish_reason is FinishReason.STOP
    assert request.text == "x"


def test_a_full_context_finishes_a_request_with_length() -> None:
    request = new_request(prompt=97, max_new_tokens=50)
    append_all(request, b"abc")
    assert request.finish_reason is FinishReason.LENGTH


def test_a_failed_request_keeps_its_text_and_the_cause() -> None:
    request = new_request()
    append_all(request, b"ab")
    cause = GenerationFailed("because")
    assert request.fail(cause).finish_reason is FinishReason.ERROR
    assert (request.text, request.error) == ("ab", cause)

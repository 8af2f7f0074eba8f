"""One place decides how a request ends."""

from typing import Any

from support.fakes import END, fake_checkpoint, says

from stream_generator.errors import GenerationFailed
from stream_generator.request import Choice, FinishReason, Request
from stream_generator.sampling_params import SamplingParams

CHECKPOINT = fake_checkpoint(says(""), context_length=100)


def request(prompt: int = 10, **params: Any) -> Request:
    return CHECKPOINT.new_request([1] * prompt, SamplingParams(**params), request_id="x")


def take_all(seq: Request, data: bytes) -> list[str]:
    return [seq.take(Choice(i)).delta for i in data]


def test_an_end_id_ends_it_and_is_neither_shown_nor_counted() -> None:
    seq = request()
    assert take_all(seq, b"hi") == ["h", "i"]
    last = seq.take(Choice(END))
    assert (last.delta, last.choice, last.finish_reason) == ("", None, FinishReason.STOP)
    assert (seq.text, len(seq.output_ids)) == ("hi", 2)


def test_what_was_held_back_comes_with_the_end_whatever_the_end() -> None:
    seq = request(stop="abc")
    assert take_all(seq, b"xab") == ["x", "", ""]
    assert seq.take(Choice(END)).delta == "ab"
    seq = request(stop="abc", max_new_tokens=3)
    assert take_all(seq, b"xab")[-1] == "ab"
    assert seq.finish_reason is FinishReason.LENGTH
    seq = request()
    take_all(seq, b"x\xe4\xbd")
    assert seq.abort().delta == "", "nobody reads it"
    assert seq.text == "x"


def test_a_stop_string_completed_by_the_last_bytes_wins_over_the_length() -> None:
    seq = request(stop="\ufffd", max_new_tokens=2)
    take_all(seq, b"x\xe4")
    assert seq.finish_reason is FinishReason.STOP
    assert seq.text == "x"


def test_the_end_of_the_context_ends_it_with_length() -> None:
    seq = request(prompt=97, max_new_tokens=50)
    take_all(seq, b"abc")
    assert seq.finish_reason is FinishReason.LENGTH


def test_a_failure_keeps_the_text_and_the_cause() -> None:
    seq = request()
    take_all(seq, b"ab")
    because = GenerationFailed("because")
    assert seq.fail(because).finish_reason is FinishReason.ERROR
    assert (seq.text, seq.error) == ("ab", because)

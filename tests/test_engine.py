"""Who is served when, and what happens to the others when one leaves or fails."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import Gate, fake_checkpoint, says

from stream_generator.engine import Engine
from stream_generator.errors import (
    DuplicateRequest,
    EngineClosed,
    GenerationFailed,
    PromptTooLong,
    QueueFull,
)
from stream_generator.sampling_params import SamplingParams
from stream_generator.sequence import FinishReason, QueuePosition, TokenOutput
from stream_generator.token_stream import TokenStream

PROMPT = list(b"assistant:")
TIMEOUT = 60  # seconds before a test that hangs fails; nothing waits for it otherwise


def submit(engine: Engine, request_id: str | None = None, **params: Any) -> TokenStream:
    return engine.submit(PROMPT, SamplingParams(**params), request_id)


def drain(stream: TokenStream) -> list[Any]:
    """All that lies in a stream's queue now."""
    found = []
    while (output := stream.get(timeout=0)) is not None:
        found.append(output)
    return found


def text(stream: TokenStream) -> str:
    return "".join(output.delta for output in stream)


@pytest.fixture
def engine() -> Engine:
    """One that the test steps itself."""
    return Engine(fake_checkpoint(says("abc")), max_waiting=3)


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Engines on their own threads, closed after the test."""
    engines: list[Engine] = []

    def start_one(next_id: Any, **options: Any) -> Engine:
        engines.append(Engine(fake_checkpoint(next_id), **options).start())
        return engines[-1]

    yield start_one
    for one in engines:
        one.close()


def test_requests_are_served_whole_and_in_the_order_they_came(engine: Engine) -> None:
    streams = [submit(engine) for _ in range(3)]
    seen = []
    while engine.step():
        for n, stream in enumerate(streams):
            seen += [n for o in drain(stream) if isinstance(o, TokenOutput)]
    assert seen == sorted(seen)
    assert [s.sequence.text for s in streams] == ["abc"] * 3
    assert [s.sequence.finish_reason for s in streams] == [FinishReason.STOP] * 3
    assert engine.step() is False


def test_a_step_computes_one_token_and_delivers_it_at_once(engine: Engine) -> None:
    stream = submit(engine)
    for expected in ("a", "b", "c", ""):
        engine.step()
        assert [o.delta for o in drain(stream)] == [expected]


def test_those_who_wait_are_told_their_place(engine: Engine) -> None:
    first, second, third = (submit(engine) for _ in range(3))
    assert drain(first) == []
    assert drain(second) == [QueuePosition(1)]
    assert drain(third) == [QueuePosition(2)]
    while not first.sequence.finish_reason:
        engine.step()
    engine.step()
    assert QueuePosition(1) in drain(third)


def test_one_more_than_the_queue_holds_is_refused_and_a_place_that_frees_is_given(
    engine: Engine,
) -> None:
    streams = [submit(engine) for _ in range(3)]
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        submit(engine)
    engine.step()
    streams.append(submit(engine))
    streams[1].close()
    engine.step()
    submit(engine)
    with pytest.raises(QueueFull):
        submit(engine)


def test_an_id_may_be_used_again_only_when_its_request_has_ended(engine: Engine) -> None:
    submit(engine, "same")
    with pytest.raises(DuplicateRequest, match="same"):
        submit(engine, "same")
    while engine.step():
        pass
    submit(engine, "same")


def test_a_reader_who_leaves_while_waiting_is_dropped_before_the_next_token(engine: Engine) -> None:
    first, second, third = (submit(engine) for _ in range(3))
    engine.step()
    second.close()
    engine.step()
    assert drain(second)[-1].finish_reason is FinishReason.ABORT
    assert [o.delta for o in drain(first)] == ["a", "b"]
    while engine.step():
        pass
    assert third.sequence.text == "abc"
    assert second.sequence.output_ids == []


def test_a_reader_who_leaves_in_mid_reply_makes_room_for_the_next(engine: Engine) -> None:
    first, second = submit(engine), submit(engine)
    engine.step()
    first.close()
    first.close()
    engine.step()
    assert first.sequence.finish_reason is FinishReason.ABORT
    assert first.sequence.text == "a"
    while engine.step():
        pass
    assert second.sequence.text == "abc"
    first.close()
    assert first.sequence.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("step", range(4))
def test_a_request_that_fails_fails_alone_and_says_so(step: int) -> None:
    def next_id(ids: list[int]) -> int:
        if ids[:1] == [7] and len(ids) == 1 + len(PROMPT) + step:
            raise RuntimeError("secret path /home")
        return says("abc")(ids)

    engine = Engine(fake_checkpoint(next_id))
    bad = engine.submit([7, *PROMPT], SamplingParams())
    good = submit(engine)
    while engine.step():
        pass
    received = []
    with pytest.raises(GenerationFailed, match="RuntimeError") as error:
        for output in bad:
            received.append(output.delta)
    assert "secret" not in str(error.value), "details belong into the log"
    assert received == ["a", "b", "c"][:step]
    assert text(good) == "abc"


def test_a_prompt_that_does_not_fit_is_refused_by_submit(engine: Engine) -> None:
    with pytest.raises(PromptTooLong):
        engine.submit([1] * 600, SamplingParams())
    assert engine.step() is False


def test_the_first_token_leaves_before_the_second_is_computed(start: Any) -> None:
    """The model may compute a token only after the reader has seen the one before."""
    gate = Gate(says("abc"))
    stream = submit(start(gate))
    for n, expected in enumerate(["a", "b", "c"], start=1):
        gate.allow()
        output = stream.get(timeout=TIMEOUT)
        assert isinstance(output, TokenOutput)
        assert (output.delta, gate.computed) == (expected, n)
    gate.allow()
    assert text(stream) == ""


def test_closing_a_stream_stops_the_computing_after_the_token_in_progress(start: Any) -> None:
    gate = Gate(says("a" * 100))
    engine = start(gate)
    stream = submit(engine)
    assert gate.arrived.acquire(timeout=TIMEOUT)
    with stream:
        pass
    gate.allow(100)
    outputs = list(stream)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert gate.computed <= 2, "at most one more than the one in progress"


def test_close_lets_nobody_hang(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    streams = [submit(engine) for _ in range(3)]
    assert gate.arrived.acquire(timeout=TIMEOUT)
    assert engine.healthy
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.allow(10)
    for stream in streams:
        with pytest.raises(GenerationFailed, match="shutting down"):
            text(stream)
    closing.join(TIMEOUT)
    assert not engine.healthy
    with pytest.raises(EngineClosed):
        submit(engine)
    with pytest.raises(EngineClosed):
        engine.clear()


def test_an_engine_whose_thread_dies_says_so_and_leaves_nobody_waiting(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(says("abc"))

    def broken() -> bool:
        raise MemoryError

    monkeypatch.setattr(engine, "step", broken)
    with pytest.raises(GenerationFailed, match="must be restarted"):
        text(submit(engine))
    engine._thread.join(TIMEOUT)
    assert not engine.healthy
    with pytest.raises(EngineClosed):
        submit(engine)


def test_clear_runs_between_two_steps_and_returns(start: Any) -> None:
    engine = start(says("abc"))
    stream = submit(engine)
    engine.clear()
    assert text(stream) == "abc"


def test_submits_from_many_threads_never_exceed_the_queue_and_lose_nothing() -> None:
    engine = Engine(fake_checkpoint(says("a")), max_waiting=10)
    admitted: list[TokenStream] = []
    refused: list[QueueFull] = []

    def submit_some() -> None:
        for _ in range(25):
            try:
                admitted.append(submit(engine))
            except QueueFull as error:
                refused.append(error)

    threads = [threading.Thread(target=submit_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert (len(admitted), len(refused)) == (10, 190)
    while engine.step():
        pass
    assert [stream.sequence.text for stream in admitted] == ["a"] * 10

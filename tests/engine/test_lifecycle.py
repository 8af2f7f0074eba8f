"""How an engine starts, drains, closes and fails, and how long a request may take."""

import threading
from typing import Any

import pytest
from support.engines import engine_of, finish, submit, text
from support.fakes import Gate, fake_checkpoint, says
from support.waiting import TIMEOUT, wait_for

from stream_generator.engine.batch import Batch
from stream_generator.errors import (
    EngineClosed,
    GenerationFailed,
    TimeLimitReached,
)
from stream_generator.request import FinishReason


def test_close_ends_every_stream_with_an_error(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    streams = [submit(engine) for _ in range(3)]
    wait_for(gate.arrived)
    assert engine.life.is_healthy
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.allow(10)
    for stream in streams:
        with pytest.raises(EngineClosed, match="shutting down"):
            text(stream)
    wait_for(closing)
    assert not engine.life.is_healthy
    with pytest.raises(EngineClosed):
        submit(engine)
    with pytest.raises(EngineClosed):
        engine.clear()


def test_an_engine_whose_thread_dies_fails_every_request() -> None:
    def interrupt(ids: list[int]) -> int:
        raise KeyboardInterrupt

    engine = engine_of(fake_checkpoint(interrupt), slots=1)
    thread = threading.Thread(target=engine.run)
    thread.start()
    with pytest.raises(GenerationFailed, match="must be restarted"):
        text(submit(engine))
    wait_for(thread)
    assert not engine.life.is_healthy
    with pytest.raises(EngineClosed):
        submit(engine)


def test_a_pending_clear_fails_once_however_often_the_engine_closes() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1)
    failures: list[type[Exception]] = []

    def clear() -> None:
        with pytest.raises(EngineClosed) as caught:
            engine.clear()
        failures.append(caught.type)

    clearing = threading.Thread(target=clear)
    clearing.start()
    wait_for(lambda: engine.pending_clears == 1, engine)
    engine.close()
    engine.close()
    wait_for(clearing)
    assert failures == [EngineClosed]


def test_a_clear_that_fails_ends_the_engine_and_reports_it_to_its_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(batch: Batch) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Batch, "clear", lost)
    engine = engine_of(fake_checkpoint(says("abc")), slots=1)
    thread = threading.Thread(target=engine.run)
    thread.start()
    with pytest.raises(GenerationFailed, match="must be restarted"):
        engine.clear()
    wait_for(thread)
    assert engine.life.has_failed


def test_clear_returns_while_a_request_runs(start: Any) -> None:
    engine = start(says("abc"))
    stream = submit(engine)
    engine.clear()
    assert text(stream) == "abc"


def test_waiting_calls_of_clear_are_served_together(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared = []
    clear = Batch.clear
    monkeypatch.setattr(Batch, "clear", lambda batch: (cleared.append(1), clear(batch)))
    gate = Gate(says("abc"))
    engine = start(gate)
    stream = submit(engine)
    wait_for(gate.arrived)
    threads = [threading.Thread(target=engine.clear) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_for(lambda: engine.pending_clears == 20, engine)
    gate.allow(100)
    for thread in threads:
        wait_for(thread)
    assert cleared == [1]
    assert text(stream) == "abc"


def test_draining_finishes_accepted_requests_and_rejects_new_ones() -> None:
    gate = Gate(says("abc"))
    engine = engine_of(fake_checkpoint(gate), slots=1)
    thread = threading.Thread(target=engine.run)
    thread.start()
    running, waiting = submit(engine), submit(engine)
    wait_for(gate.arrived)
    engine.drain(seconds=TIMEOUT)
    assert engine.life.is_healthy
    assert not engine.life.is_accepting
    with pytest.raises(EngineClosed, match="shutting down"):
        submit(engine)
    gate.allow(100)
    assert [text(running), text(waiting)] == ["abc", "abc"]
    wait_for(thread)
    assert not engine.life.has_failed


def test_a_request_that_outlasts_the_drain_ends_with_an_error(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate, slots=1)
    running, waiting = submit(engine), submit(engine)
    wait_for(gate.arrived)
    engine.drain(seconds=0)
    gate.allow(100)
    for stream in (running, waiting):
        with pytest.raises(EngineClosed, match="shutting down"):
            text(stream)


def test_the_time_limit_ends_a_reply_with_length_and_fails_a_waiting_request() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1)
    first, second, third = submit(engine), submit(engine), submit(engine)
    engine.step()
    first.request.deadline = second.request.deadline = 0.0  # long ago
    finish(engine)
    assert (text(first), first.request.finish_reason) == ("ab", FinishReason.LENGTH)
    with pytest.raises(TimeLimitReached, match="time limit"):
        text(second)
    assert text(third) == "abc"


def test_each_request_gets_the_time_limit_of_the_engine() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1, max_seconds=50)
    request = submit(engine).request
    assert request.deadline == request.submitted_at + 50
    assert submit(engine_of(fake_checkpoint(says("abc")), slots=1)).request.deadline is None


def test_a_caller_can_wait_for_the_end_of_a_request(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    stream = submit(engine)
    wait_for(gate.arrived)
    stream.close()
    gate.allow()
    engine.wait_for(lambda: stream.request.finish_reason)
    assert stream.request.finish_reason is FinishReason.ABORT


def test_an_engine_whose_step_hangs_is_not_healthy(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    submit(engine)
    wait_for(gate.arrived)
    assert engine.life.is_accepting
    monkeypatch.setattr("stream_generator.engine.lifecycle.STUCK_SECONDS", 0.0)
    assert not engine.life.is_accepting
    gate.allow(100)

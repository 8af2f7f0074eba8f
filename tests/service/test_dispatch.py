"""`Dispatcher` limits the open requests, finds them by id, and aborts them."""

import threading
from collections.abc import Iterator

import pytest
from support.engines import PROMPT, engine_of
from support.fakes import Gate, fake_checkpoint, says
from support.service import free_places
from support.waiting import wait_for

from stream_generator.engine.engine import Engine
from stream_generator.errors import DuplicateRequest, EngineClosed, QueueFull
from stream_generator.sampling_params import SamplingParams
from stream_service.dispatch import MAX_RETRY_SECONDS, Dispatcher


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1, max_waiting=3).start()
    yield engine
    engine.close()


def test_a_request_over_the_limit_is_rejected_until_another_is_released(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    admissions = [dispatcher.admit(str(n), None) for n in range(4)]
    with pytest.raises(QueueFull, match="4 requests are open"):
        dispatcher.admit("x", None)
    admissions[0].release()
    admissions[0].release()
    dispatcher.admit("x", None)
    with pytest.raises(QueueFull):
        dispatcher.admit("y", None)


def test_ten_thousand_racing_requests_never_exceed_the_limit(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    counting = threading.Lock()
    held = 0  # never above the number of open requests
    counts, rejected = [], []

    def count(change: int) -> int:
        nonlocal held
        with counting:
            held += change
            return held

    def race(number: int) -> None:
        for n in range(625):
            try:
                admission = dispatcher.admit(f"{number}-{n}", None)
            except QueueFull:
                rejected.append(1)
                continue
            counts.append(count(1))
            count(-1)
            admission.release()

    threads = [threading.Thread(target=race, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        wait_for(thread)
    assert len(counts) + len(rejected) == 10_000
    assert max(counts) <= 4
    assert free_places(dispatcher) == 4


def test_an_id_belongs_to_at_most_one_open_request(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    first = dispatcher.admit("same", None)
    with pytest.raises(DuplicateRequest, match="same"):
        dispatcher.admit("same", None)
    first.release()
    dispatcher.admit("same", None)
    first.release()  # a late second release keeps the newer request open
    with pytest.raises(DuplicateRequest):
        dispatcher.admit("same", None)


def test_the_dispatcher_admits_no_request_while_the_engine_drains(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    engine.drain(60)
    with pytest.raises(EngineClosed, match="accepts no requests"):
        dispatcher.admit("x", None)


def test_an_abort_before_the_prompt_is_submitted_still_aborts_the_request() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1)
    dispatcher = Dispatcher(engine)
    admission = dispatcher.admit("early", None)
    assert dispatcher.abort("early") is admission
    (stream,) = admission.submit([PROMPT], SamplingParams())
    engine.step()
    assert stream.request.finish_reason == "abort"
    assert stream.request.output_ids == []


def test_retry_after_depends_on_how_long_requests_take() -> None:
    gate = Gate(says("abc"))
    engine = engine_of(fake_checkpoint(gate), slots=2).start()
    dispatcher = Dispatcher(engine)
    assert dispatcher.retry_after() == 1
    gate.allow(100)
    for seconds, expected in ((7.5, 8), (1e9, MAX_RETRY_SECONDS)):
        admission = dispatcher.admit("a", None)
        (stream,) = admission.submit([PROMPT], SamplingParams())
        list(stream)
        stream.request.started_at = stream.request.finished_at - seconds
        admission.release()
        assert dispatcher.retry_after() == expected
    engine.close()

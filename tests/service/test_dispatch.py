"""Places are counted before any work, and each is given back once."""

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


def test_one_more_than_there_are_places_is_refused_before_it_is_looked_at(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    places = [dispatcher.admit(str(n), None) for n in range(4)]
    with pytest.raises(QueueFull, match="4 requests are open"):
        dispatcher.admit("x", None)
    places[0].release()
    places[0].release()
    dispatcher.admit("x", None)
    with pytest.raises(QueueFull):
        dispatcher.admit("y", None)


def test_ten_thousand_who_race_never_hold_more_places_than_there_are(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    counting = threading.Lock()
    held = 0  # at least so many places are taken
    most, refused = [], []

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
                refused.append(1)
                continue
            most.append(count(1))
            count(-1)
            admission.release()

    threads = [threading.Thread(target=race, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        wait_for(thread)
    assert len(most) + len(refused) == 10_000
    assert max(most) <= 4
    assert free_places(dispatcher) == 4


def test_an_id_names_one_request_at_a_time(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    first = dispatcher.admit("same", None)
    with pytest.raises(DuplicateRequest, match="same"):
        dispatcher.admit("same", None)
    first.release()
    dispatcher.admit("same", None)
    first.release()  # again, late: the place of the second stays
    with pytest.raises(DuplicateRequest):
        dispatcher.admit("same", None)


def test_nothing_is_taken_in_once_the_engine_drains(engine: Engine) -> None:
    dispatcher = Dispatcher(engine)
    engine.drain(60)
    with pytest.raises(EngineClosed, match="accepts no requests"):
        dispatcher.admit("x", None)


def test_a_stop_that_comes_before_the_prompt_is_ready_ends_it_all_the_same() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1)
    dispatcher = Dispatcher(engine)
    admission = dispatcher.admit("early", None)
    assert dispatcher.abort("early") is admission
    (stream,) = admission.submit([PROMPT], SamplingParams())
    engine.step()
    assert stream.request.finish_reason == "abort"
    assert stream.request.output_ids == []


def test_when_to_try_again_follows_from_how_long_requests_take() -> None:
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

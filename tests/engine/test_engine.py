"""The order in which requests are served, and the effect of one request on the others."""

import contextlib
import random
import threading
from typing import Any

import pytest
from support.engines import PROMPT, drain, engine_of, finish, free_slots, submit, text
from support.fakes import Gate, byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama
from support.waiting import TIMEOUT, wait_for

from stream_generator.engine.engine import Engine
from stream_generator.engine.runners import runner_for
from stream_generator.engine.solo_runner import SoloRunner
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import (
    CheckpointError,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
)
from stream_generator.generate import stream_generate
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import FinishReason, QueuePosition, TokenOutput
from stream_generator.sampling_params import SamplingParams


def test_one_slot_serves_requests_one_by_one_in_order_of_arrival(engine: Engine) -> None:
    streams = [submit(engine) for _ in range(3)]
    seen = []
    while engine.step():
        for n, stream in enumerate(streams):
            seen += [n for o in drain(stream) if isinstance(o, TokenOutput)]
    assert seen == sorted(seen)
    assert [s.request.text for s in streams] == ["abc"] * 3
    assert [s.request.finish_reason for s in streams] == [FinishReason.STOP] * 3
    assert engine.step() is False


def test_a_step_computes_one_token_and_delivers_it_at_once(engine: Engine) -> None:
    stream = submit(engine)
    for expected in ("a", "b", "c", ""):
        engine.step()
        assert [o.delta for o in drain(stream)] == [expected]


def test_a_waiting_request_is_told_its_position_in_the_queue(engine: Engine) -> None:
    first, second, third = (submit(engine) for _ in range(3))
    assert drain(first) == []
    assert drain(second) == [QueuePosition(1)]
    assert drain(third) == [QueuePosition(2)]
    while not first.request.finish_reason:
        engine.step()
    engine.step()
    assert QueuePosition(1) in drain(third)


def test_a_waiting_request_whose_reader_leaves_is_aborted_by_the_next_step(engine: Engine) -> None:
    first, second, third = (submit(engine) for _ in range(3))
    engine.step()
    second.close()
    engine.step()
    assert drain(second)[-1].finish_reason is FinishReason.ABORT
    assert [o.delta for o in drain(first)] == ["a", "b"]
    finish(engine)
    assert third.request.text == "abc"
    assert second.request.output_ids == []


def test_a_running_request_whose_reader_leaves_releases_its_slot(engine: Engine) -> None:
    first, second = submit(engine), submit(engine)
    engine.step()
    first.close()
    first.close()
    engine.step()
    assert first.request.finish_reason is FinishReason.ABORT
    assert first.request.text == "a"
    finish(engine)
    assert second.request.text == "abc"
    first.close()
    assert first.request.finish_reason is FinishReason.ABORT


def test_iterating_a_finished_stream_again_yields_nothing(engine: Engine) -> None:
    stream = submit(engine)
    finish(engine)
    assert text(stream) == "abc"
    assert text(stream) == ""


def test_each_token_is_delivered_before_the_next_is_computed(start: Any) -> None:
    """The model gets a permit for a token only after the reader has the token before it."""
    gate = Gate(says("abc"))
    stream = submit(start(gate))
    for n, expected in enumerate(["a", "b", "c"], start=1):
        gate.allow()
        output = stream.get(timeout=TIMEOUT)
        assert isinstance(output, TokenOutput)
        assert (output.delta, gate.num_computed_tokens) == (expected, n)
    gate.allow()
    assert text(stream) == ""


def test_closing_a_stream_stops_its_request_after_the_token_in_progress(start: Any) -> None:
    gate = Gate(says("a" * 100))
    engine = start(gate)
    stream = submit(engine)
    wait_for(gate.arrived)
    with stream:
        pass
    gate.allow(100)
    outputs = list(stream)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert gate.num_computed_tokens <= 2, "the token in progress and at most one more"


def test_every_running_request_gets_a_token_in_every_step() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=3)
    streams = [submit(engine) for _ in range(3)]
    for expected in ("a", "ab", "abc"):
        engine.step()
        assert [s.request.text for s in streams] == [expected] * 3


def test_each_first_token_is_delivered_before_the_step_computes_the_next_prompt() -> None:
    seen: list[list[int]] = []
    streams: list[TokenStream] = []

    def next_id(ids: list[int]) -> int:
        seen.append([len(s.request.output_ids) for s in streams])
        return says("abc")(ids)

    engine = engine_of(fake_checkpoint(next_id), slots=3)
    streams += [engine.submit([50 + n, *PROMPT], SamplingParams()) for n in range(3)]
    seen.clear()
    engine.step()
    assert seen == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_requests_join_and_leave_between_any_two_steps() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=2)
    first = submit(engine)
    engine.step()
    second, third = submit(engine), submit(engine)
    assert drain(third) == [QueuePosition(1)]
    engine.step()
    assert (first.request.text, second.request.text) == ("ab", "a")
    first.close()
    engine.step()
    assert first.request.text == "ab"
    assert (second.request.text, third.request.text) == ("ab", "a")


def test_a_long_prompt_is_computed_in_chunks_beside_running_replies() -> None:
    engine = engine_of(fake_checkpoint(says("x" * 100), context_length=2000), slots=2)
    first = submit(engine)
    engine.step()
    long = engine.submit([1] * 900 + PROMPT, SamplingParams())
    steps = 0
    while long.request.num_uncomputed_tokens:
        before = len(first.request.output_ids)
        engine.step()
        steps += 1
        assert len(first.request.output_ids) == before + 1
    assert steps > 1
    long.close()
    engine.step()
    assert long.request.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("when", ["in the prompt", "decoding"])
def test_an_aborted_request_releases_its_slot_in_the_next_step(when: str) -> None:
    engine = engine_of(fake_checkpoint(says("x" * 50), context_length=2000), slots=1)
    stream = engine.submit([1] * 900 + PROMPT, SamplingParams())
    engine.step()
    if when == "decoding":
        while stream.request.num_uncomputed_tokens:
            engine.step()
    stream.close()
    engine.step()
    assert stream.request.finish_reason is FinishReason.ABORT
    assert free_slots(engine) == 1


def test_a_thousand_requests_aborted_at_random_leave_nothing_behind() -> None:
    rng = random.Random(0)
    engine = engine_of(fake_checkpoint(says("abcdef")), slots=4, max_waiting=20)
    threads = threading.active_count()
    open_streams: list[TokenStream] = []
    ended: list[TokenStream] = []
    while len(ended) < 1000:
        if rng.random() < 0.6:
            with contextlib.suppress(QueueFull):
                prompt = [rng.randrange(32, 99) for _ in range(rng.randrange(60))] + PROMPT
                open_streams.append(engine.submit(prompt, SamplingParams()))
        if open_streams and rng.random() < 0.3:
            rng.choice(open_streams).close()
        engine.step()
        ended += [s for s in open_streams if s.request.finish_reason]
        open_streams = [s for s in open_streams if not s.request.finish_reason]
    finish(engine)
    assert engine.requests == []
    assert (engine.running, engine.waiting) == (0, 0)
    assert free_slots(engine) == 4
    assert threading.active_count() == threads
    for stream in ended:
        if stream.request.finish_reason is FinishReason.STOP:
            assert stream.request.text == "abcdef"
        else:
            assert stream.request.finish_reason is FinishReason.ABORT
            assert "abcdef".startswith(stream.request.text)


def test_requests_that_arrive_together_compute_their_shared_prompt_once() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=3)
    prompt = [50] * 40 + PROMPT
    streams = [engine.submit(prompt, SamplingParams()) for _ in range(3)]
    finish(engine)
    assert [s.request.num_cached_tokens for s in streams] == [0, 49, 49]
    assert [text(s) for s in streams] == ["abc"] * 3


def test_max_concurrent_and_max_context_set_the_slots() -> None:
    model = tiny_llama(vocab_size=258)
    runner = runner_for(model, 256, max_concurrent=5, max_context=100)
    assert (runner.slots, runner.context_length) == (5, 100)
    assert "up to 5 requests at a time, with up to 100 tokens each" in runner.describe()
    engine = Engine(Checkpoint.of(model, byte_tokenizer()), runner=runner)
    with pytest.raises(PromptTooLong, match="context holds 100"):
        engine.submit([1] * 100, SamplingParams())
    stream = engine.submit([1] * 95, SamplingParams())
    finish(engine)
    assert stream.request.finish_reason is FinishReason.LENGTH
    assert len(stream.request.output_ids) == 5


def test_slots_that_exceed_the_memory_are_rejected() -> None:
    with pytest.raises(CheckpointError, match=r"GB for keys and values, but .* are free; lower"):
        runner_for(tiny_llama(max_position_embeddings=10**7), 10**7, max_concurrent=10**6)


def test_the_solo_runner_and_stream_generate_reject_log_probabilities() -> None:
    fake = fake_checkpoint(says("abc"))
    engine = Engine(fake, runner=SoloRunner(fake.model, 512))
    with pytest.raises(InvalidRequest, match="without log-probabilities"):
        submit(engine, logprobs=1)
    stream = submit(engine)
    finish(engine)
    assert text(stream) == "abc"
    with pytest.raises(InvalidRequest, match="logprobs need the engine"):
        stream_generate(fake.model, fake.tokenizer, PROMPT, logprobs=1)


def test_aborting_a_request_that_waits_for_the_solo_runner_disturbs_no_other() -> None:
    fake = fake_checkpoint(says("abc"))
    engine = Engine(fake, runner=SoloRunner(fake.model, 512))
    first, second = submit(engine), submit(engine)
    engine.step()
    second.close()
    finish(engine)
    assert text(first) == "abc"
    assert second.request.finish_reason is FinishReason.ABORT

"""Who is served when, and what happens to the others when one leaves or fails."""

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.engines import engine_of
from support.fakes import Gate, byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama

from stream_generator.engine.engine import Engine
from stream_generator.engine.model_runner import SoloRunner, runner_for
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import (
    CheckpointError,
    DuplicateRequest,
    EngineClosed,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    TimeLimitReached,
)
from stream_generator.generate import stream_generate
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import FinishReason, QueuePosition, TokenOutput
from stream_generator.sampling_params import SamplingParams

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
    """One that the test steps itself, and that serves one request at a time."""
    return engine_of(fake_checkpoint(says("abc")), slots=1, max_waiting=3)


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Engines on their own threads, closed after the test."""
    engines: list[Engine] = []

    def start_one(next_id: Any, **options: Any) -> Engine:
        engines.append(engine_of(fake_checkpoint(next_id), **{"slots": 4, **options}).start())
        return engines[-1]

    yield start_one
    for one in engines:
        one.close()


def test_with_one_slot_requests_are_served_whole_and_in_the_order_they_came(
    engine: Engine,
) -> None:
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


def test_those_who_wait_are_told_their_place(engine: Engine) -> None:
    first, second, third = (submit(engine) for _ in range(3))
    assert drain(first) == []
    assert drain(second) == [QueuePosition(1)]
    assert drain(third) == [QueuePosition(2)]
    while not first.request.finish_reason:
        engine.step()
    engine.step()
    assert QueuePosition(1) in drain(third)


def test_one_more_than_the_queue_holds_is_refused_and_a_place_that_frees_is_given(
    engine: Engine,
) -> None:
    streams = [submit(engine) for _ in range(4)]  # one slot, three places to wait
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        submit(engine)
    engine.step()
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        submit(engine)
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
    assert third.request.text == "abc"
    assert second.request.output_ids == []


def test_a_reader_who_leaves_in_mid_reply_makes_room_for_the_next(engine: Engine) -> None:
    first, second = submit(engine), submit(engine)
    engine.step()
    first.close()
    first.close()
    engine.step()
    assert first.request.finish_reason is FinishReason.ABORT
    assert first.request.text == "a"
    while engine.step():
        pass
    assert second.request.text == "abc"
    first.close()
    assert first.request.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("step", range(4))
def test_a_request_that_fails_fails_alone_and_says_so(step: int, slots: int) -> None:
    def next_id(ids: list[int]) -> int:
        if ids[:1] == [7] and len(ids) == 1 + len(PROMPT) + step:
            raise RuntimeError("secret path /home")
        return says("abc")(ids)

    engine = engine_of(fake_checkpoint(next_id), slots=slots)
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
        assert (output.delta, gate.num_computed_tokens) == (expected, n)
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
    assert gate.num_computed_tokens <= 2, "at most one more than the one in progress"


def test_close_lets_nobody_hang(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    streams = [submit(engine) for _ in range(3)]
    assert gate.arrived.acquire(timeout=TIMEOUT)
    assert engine.life.is_healthy
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.allow(10)
    for stream in streams:
        with pytest.raises(EngineClosed, match="shutting down"):
            text(stream)
    closing.join(TIMEOUT)
    assert not engine.life.is_healthy
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
    assert not engine.life.is_healthy
    with pytest.raises(EngineClosed):
        submit(engine)


def test_clear_runs_between_two_steps_and_returns(start: Any) -> None:
    engine = start(says("abc"))
    stream = submit(engine)
    engine.clear()
    assert text(stream) == "abc"


def test_submits_from_many_threads_never_exceed_the_queue_and_lose_nothing() -> None:
    engine = engine_of(fake_checkpoint(says("a")), slots=4, max_waiting=6)
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
    assert [stream.request.text for stream in admitted] == ["a"] * 10


def test_a_model_that_runs_alone_refuses_log_probabilities_by_name() -> None:
    fake = fake_checkpoint(says("abc"))
    engine = Engine(fake, runner=SoloRunner(fake.model, 512))
    with pytest.raises(InvalidRequest, match="no log-probabilities"):
        submit(engine, logprobs=1)
    stream = submit(engine)
    while engine.step():
        pass
    assert text(stream) == "abc"
    with pytest.raises(InvalidRequest, match="logprobs need the engine"):
        stream_generate(fake.model, fake.tokenizer, PROMPT, logprobs=1)


# Many at once


def test_requests_side_by_side_get_a_token_each_in_every_step() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=3)
    streams = [submit(engine) for _ in range(3)]
    for expected in ("a", "ab", "abc"):
        engine.step()
        assert [s.request.text for s in streams] == [expected] * 3


def test_each_first_token_leaves_before_the_next_prompt_of_the_step_is_computed() -> None:
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


def test_one_joins_and_one_leaves_between_any_two_steps() -> None:
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


def test_a_long_prompt_comes_in_chunks_and_the_others_go_on() -> None:
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
def test_a_slot_that_is_left_is_free_after_the_step(when: str) -> None:
    engine = engine_of(fake_checkpoint(says("x" * 50), context_length=2000), slots=1)
    stream = engine.submit([1] * 900 + PROMPT, SamplingParams())
    engine.step()
    if when == "decoding":
        while stream.request.num_uncomputed_tokens:
            engine.step()
    stream.close()
    engine.step()
    assert engine._batch.free_slots == 1
    assert stream.request.finish_reason is FinishReason.ABORT


def test_a_thousand_who_come_and_go_at_random_leave_nothing_behind() -> None:
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
    while engine.step():
        pass
    assert engine._batch.free_slots == 4
    assert not engine._streams
    assert not engine.running
    assert not engine._batch.waiting
    assert threading.active_count() == threads
    for stream in ended:
        if stream.request.finish_reason is FinishReason.STOP:
            assert stream.request.text == "abcdef"
        else:
            assert stream.request.finish_reason is FinishReason.ABORT
            assert "abcdef".startswith(stream.request.text)


class Failing:
    """Raises `error` in forwards that hold a row for which `hits` is true."""

    def __init__(self, error: BaseException, hits: Callable[[list[int]], bool]):
        self.error = error
        self.hits = hits

    def __call__(self, ids: list[int]) -> int:
        if self.hits(ids):
            raise self.error
        return says("abc")(ids)


def test_when_memory_is_short_the_newest_request_goes_and_the_others_go_on() -> None:
    shortage: list[bool] = []

    def hits(ids: list[int]) -> bool:
        return bool(shortage and shortage.pop())

    error = torch.OutOfMemoryError("CUDA out of memory, at 0x7f")
    engine = engine_of(fake_checkpoint(Failing(error, hits)), slots=3)
    streams = [submit(engine) for _ in range(3)]
    for _ in range(3):
        engine.step()
    shortage.append(True)
    while engine.step():
        pass
    with pytest.raises(GenerationFailed, match="out of memory; shorten"):
        text(streams[-1])
    assert [text(s) for s in streams[:-1]] == ["abc", "abc"]


def test_a_failure_of_the_whole_step_that_passes_loses_nobody() -> None:
    """What fails together and works alone is nobody's own fault."""
    trouble = iter([True])

    def hits(ids: list[int]) -> bool:
        return bytes(ids[-1:]) == b"b" and next(trouble, False)

    engine = engine_of(fake_checkpoint(Failing(RuntimeError("once"), hits)), slots=3)
    streams = [submit(engine) for _ in range(3)]
    while engine.step():
        pass
    assert [text(s) for s in streams] == ["abc"] * 3


@pytest.mark.parametrize("step", range(6))
def test_nan_in_one_row_fails_it_alone_and_poisons_no_slot(step: int) -> None:
    """With a real attention: 0 times NaN is NaN, so what a failed row has left must be wiped."""
    model = tiny_llama(vocab_size=258)
    untouched = copy.deepcopy(model)
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    engine = Engine(checkpoint, runner=runner_for(model, 256, max_concurrent=2))
    params = SamplingParams(temperature=0, max_new_tokens=12)
    bad = engine.submit([200] * 9, params)
    good = engine.submit([7, 8, 9], params)

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Spoil the row that stands in slot 0 while the bad request has it."""
        rows = engine._runner._cache.layers[0].rows
        hit = bad.request.finish_reason is None and len(bad.request.output_ids) >= step
        if hit and 0 in rows.slots:
            output = output.clone()
            output[rows.slots.index(0)] = torch.nan
        return output

    handle = model.model.layers[0].register_forward_hook(poison)
    while engine.step():
        pass
    handle.remove()
    with pytest.raises(GenerationFailed, match="NaN"):
        text(bad)
    expected = untouched.generate(torch.tensor([[7, 8, 9]]), do_sample=False, max_new_tokens=12)
    assert good.request.output_ids == expected[0, 3:].tolist()
    after = engine.submit([7, 8, 9], params)
    beside = engine.submit([5] * 40, params)
    while engine.step():
        pass
    assert after.request.output_ids == expected[0, 3:].tolist()
    assert beside.request.finish_reason is FinishReason.LENGTH


def test_what_the_memory_does_not_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(CheckpointError, match=r"GB for keys and values, but .* are free; lower"):
        runner_for(tiny_llama(max_position_embeddings=10**7), 10**7, max_concurrent=10**6)


def test_slots_follow_from_what_is_asked_for() -> None:
    model = tiny_llama(vocab_size=258)
    runner = runner_for(model, 256, max_concurrent=5, max_context=100)
    assert (runner.slots, runner.context_length) == (5, 100)
    assert "up to 5 requests at a time of up to 100 tokens" in runner.describe()
    engine = Engine(Checkpoint.of(model, byte_tokenizer()), runner=runner)
    with pytest.raises(PromptTooLong, match="context holds 100"):
        engine.submit([1] * 100, SamplingParams())
    stream = engine.submit([1] * 95, SamplingParams())
    while engine.step():
        pass
    assert stream.request.finish_reason is FinishReason.LENGTH
    assert len(stream.request.output_ids) == 5


def test_requests_that_come_together_with_one_prompt_compute_it_once() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=3)
    prompt = [50] * 40 + PROMPT
    streams = [engine.submit(prompt, SamplingParams()) for _ in range(3)]
    while engine.step():
        pass
    assert [s.request.num_cached_tokens for s in streams] == [0, 49, 49]
    assert [text(s) for s in streams] == ["abc"] * 3


def test_a_tokenizer_that_fails_on_one_reply_fails_that_request_alone() -> None:
    checkpoint = fake_checkpoint(says("abc"))
    engine = engine_of(checkpoint, slots=2)
    bad, good = submit(engine), submit(engine)

    class Broken:
        def decode(self, token_id: int) -> str:
            raise TypeError("secret")

        flush = decode

    bad.request.detokenizer = Broken()  # type: ignore[assignment]
    while engine.step():
        pass
    with pytest.raises(GenerationFailed, match="TypeError"):
        text(bad)
    assert text(good) == "abc"


def test_one_who_leaves_the_queue_of_a_model_that_runs_alone_disturbs_nobody() -> None:
    fake = fake_checkpoint(says("abc"))
    engine = Engine(fake, runner=SoloRunner(fake.model, 512))
    first, second = submit(engine), submit(engine)
    engine.step()
    second.close()
    while engine.step():
        pass
    assert text(first) == "abc"
    assert second.request.finish_reason is FinishReason.ABORT


def test_a_step_that_is_tried_again_draws_the_same_numbers() -> None:
    """Where it was the sampling that failed, the numbers had been drawn already."""
    model = tiny_llama(vocab_size=258)
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    params = SamplingParams(seed=5, temperature=2.0, max_new_tokens=12)
    replies = []
    for fails in (False, True):
        engine = Engine(checkpoint, runner=runner_for(model, 256, max_concurrent=2))
        streams = [engine.submit([1, 2, n], params) for n in (3, 4)]
        decode, trouble = engine._runner.decode, [fails]

        def flaky(requests: Any, decode: Any = decode, trouble: Any = trouble) -> Any:
            result = decode(requests)
            if len(requests) == 2 and trouble and trouble.pop():
                for request in requests:
                    request.num_computed_tokens -= 1
                raise RuntimeError
            return result

        engine._runner.decode = flaky  # type: ignore[method-assign]
        while engine.step():
            pass
        replies.append([s.request.output_ids for s in streams])
    assert replies[0] == replies[1]


def test_a_stream_that_has_ended_ends_again_when_it_is_iterated_again(engine: Engine) -> None:
    stream = submit(engine)
    while engine.step():
        pass
    assert text(stream) == "abc"
    assert text(stream) == ""


def test_several_replies_to_one_prompt_compute_it_once_and_are_those_of_each_seed() -> None:
    checkpoint = Checkpoint.of(tiny_llama(vocab_size=258), byte_tokenizer())
    params = SamplingParams(seed=5, temperature=2.0, max_new_tokens=8)
    engine = engine_of(checkpoint, slots=4, max_waiting=0)
    together = engine.submit_several([PROMPT], params, 4, "r")
    assert [stream.id for stream in together] == ["r", "r#1", "r#2", "r#3"]
    while engine.step():
        pass
    cached = [stream.request.num_cached_tokens for stream in together]
    assert cached == [0, *[len(PROMPT) - 1] * 3]
    replies = [stream.request.output_ids for stream in together]
    for n, ids in enumerate(replies):
        alone = engine_of(checkpoint, slots=1)
        stream = alone.submit(PROMPT, params.model_copy(update={"seed": 5 + n}))
        while alone.step():
            pass
        assert stream.request.output_ids == ids
    assert len(set(map(tuple, replies))) > 1


def test_several_replies_are_taken_in_all_or_none(engine: Engine) -> None:
    submit(engine, "x#1")
    with pytest.raises(QueueFull):
        engine.submit_several([PROMPT], SamplingParams(), 4)
    with pytest.raises(DuplicateRequest):
        engine.submit_several([PROMPT], SamplingParams(), 2, "x")
    assert len(engine.submit_several([PROMPT], SamplingParams(), 3)) == 3


@pytest.mark.parametrize("when", ["prompt", "reply"])
def test_a_lost_device_ends_the_engine_at_once_and_everybody_is_told(when: str) -> None:
    """After an illegal access, say, nothing succeeds on a GPU any more in this process."""

    def next_id(ids: list[int]) -> int:
        if when == "prompt" or ids[-1] == ord("a"):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return ord("a")

    def after_the_probe(ids: list[int]) -> int:
        return (
            next_id(ids) if bytes(i for i in ids if i < 256).endswith(b":") or ids[-1] == 97 else 1
        )

    engine = engine_of(fake_checkpoint(after_the_probe), slots=2)

    def fails_too(*args: Any, **kwargs: Any) -> None:
        raise torch.AcceleratorError("CUDA error: the device is lost")

    engine._runner.release = fails_too
    streams = [submit(engine), submit(engine)]
    engine.run()
    assert engine.life.has_failed
    assert not engine.running
    assert not engine.life.is_healthy
    for stream in streams:
        with pytest.raises(GenerationFailed, match="restarted"):
            list(stream)
    with pytest.raises(EngineClosed):
        submit(engine)


def test_replies_to_several_prompts_come_prompt_by_prompt() -> None:
    def echo(ids: list[int]) -> int:
        return ids[0] if len(ids) < 13 else 256

    engine = engine_of(fake_checkpoint(echo), slots=4)
    streams = engine.submit_several([[65, *PROMPT], [66, *PROMPT]], SamplingParams(), 2, "r")
    while engine.step():
        pass
    assert [text(s) for s in streams] == ["AA", "AA", "BB", "BB"]
    assert [s.id for s in streams] == ["r", "r#1", "r#2", "r#3"]


def test_more_replies_than_could_ever_be_served_are_no_matter_of_waiting(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="5 replies are more than the 4"):
        engine.submit_several([PROMPT], SamplingParams(), 5)


def test_the_prompts_that_wait_are_bounded_in_tokens_too() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1, max_waiting=100)
    long = [1] * 500
    taken = []
    with pytest.raises(QueueFull, match="too long in all"):
        for _ in range(100):
            taken.append(engine.submit(long, SamplingParams()))
    assert sum(len(s.request.prompt_ids) for s in taken) <= engine.intake.waiting_tokens
    assert len(taken) == engine.intake.waiting_tokens // 500
    while engine.step():
        pass
    engine.submit(long, SamplingParams())


def test_racing_submits_exceed_neither_bound() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=4, max_waiting=300)
    refused = []

    def submit_some() -> None:
        rng = random.Random(threading.get_ident())
        for _ in range(625):
            try:
                engine.submit([1] * rng.randrange(1, 100), SamplingParams())
            except QueueFull:
                refused.append(1)
            assert engine.waiting <= 304
            waiting = list(engine._batch.waiting)
            assert sum(len(s.prompt_ids) for s in waiting) <= engine.intake.waiting_tokens

    with ThreadPoolExecutor(16) as pool:
        for racing in [pool.submit(submit_some) for _ in range(16)]:
            racing.result()  # raises what was raised there
    assert len(refused) + engine.waiting == 10_000


def test_draining_finishes_what_is_there_and_takes_nothing_new(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate, slots=1)
    running, waiting = submit(engine), submit(engine)
    assert gate.arrived.acquire(timeout=TIMEOUT)
    engine.drain(seconds=TIMEOUT)
    assert engine.life.is_healthy
    assert not engine.life.is_accepting
    with pytest.raises(EngineClosed, match="shutting down"):
        submit(engine)
    gate.allow(100)
    assert [text(running), text(waiting)] == ["abc", "abc"]
    engine._thread.join(timeout=TIMEOUT)
    assert not engine._thread.is_alive()
    assert not engine.life.has_failed


def test_what_is_left_when_draining_has_lasted_too_long_is_told_so(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate, slots=1)
    running, waiting = submit(engine), submit(engine)
    assert gate.arrived.acquire(timeout=TIMEOUT)
    engine.drain(seconds=0)
    gate.allow(100)
    for stream in (running, waiting):
        with pytest.raises(EngineClosed, match="shutting down"):
            text(stream)


def test_a_reply_ends_by_length_when_its_time_is_over_and_a_prompt_never_begins() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1)
    first, second, third = submit(engine), submit(engine), submit(engine)
    engine.step()
    first.request.deadline = second.request.deadline = 0.0  # long ago
    while engine.step():
        pass
    assert (text(first), first.request.finish_reason) == ("ab", FinishReason.LENGTH)
    with pytest.raises(TimeLimitReached, match="time limit"):
        text(second)
    assert text(third) == "abc"


def test_each_request_has_the_time_that_the_engine_gives_it() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1, max_seconds=50)
    request = submit(engine).request
    assert request.deadline == request.submitted_at + 50
    assert submit(engine_of(fake_checkpoint(says("abc")), slots=1)).request.deadline is None


def test_one_may_wait_until_another_ones_request_has_ended(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    stream = submit(engine)
    assert gate.arrived.acquire(timeout=TIMEOUT)
    stream.close()
    gate.allow()
    engine.wait_until_finished(stream.request)
    assert stream.request.finish_reason is FinishReason.ABORT


def test_a_step_that_hangs_is_no_sign_of_health(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    submit(engine)
    assert gate.arrived.acquire(timeout=TIMEOUT)
    assert engine.life.is_accepting
    monkeypatch.setattr("stream_generator.engine.lifecycle.STUCK_SECONDS", 0.0)
    assert not engine.life.is_accepting
    gate.allow(100)


def test_many_who_clear_at_once_are_served_by_one_clearing(start: Any) -> None:
    gate = Gate(says("abc"))
    engine = start(gate)
    stream = submit(engine)
    assert gate.arrived.acquire(timeout=TIMEOUT)
    cleared = []
    original = engine._batch.clear
    engine._batch.clear = lambda: (cleared.append(1), original())
    threads = [threading.Thread(target=engine.clear) for _ in range(20)]
    for thread in threads:
        thread.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: len(engine._clears) == 20, TIMEOUT)
    gate.allow(100)
    for thread in threads:
        thread.join(TIMEOUT)
    assert cleared == [1]
    assert text(stream) == "abc"

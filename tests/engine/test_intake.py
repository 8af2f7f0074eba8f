"""Which requests an engine accepts, and when it rejects one."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.engines import PROMPT, engine_of, finish, submit, text
from support.fakes import byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama
from support.waiting import wait_for

from stream_generator.engine.engine import Engine
from stream_generator.engine.token_stream import TokenStream
from stream_generator.errors import (
    DuplicateRequest,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
)
from stream_generator.loaded_model import Checkpoint
from stream_generator.sampling_params import SamplingParams


def test_a_full_queue_rejects_a_request_until_a_place_is_free(engine: Engine) -> None:
    streams = [submit(engine) for _ in range(4)]  # one slot, and a queue of three
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


def test_a_request_id_may_be_used_again_only_after_its_request_has_ended(engine: Engine) -> None:
    submit(engine, "same")
    with pytest.raises(DuplicateRequest, match="same"):
        submit(engine, "same")
    finish(engine)
    submit(engine, "same")


def test_submit_rejects_a_prompt_that_does_not_fit_the_context(engine: Engine) -> None:
    with pytest.raises(PromptTooLong):
        engine.submit([1] * 600, SamplingParams())
    assert engine.step() is False


def test_submits_from_many_threads_never_exceed_the_queue_and_lose_no_request() -> None:
    engine = engine_of(fake_checkpoint(says("a")), slots=4, max_waiting=6)
    accepted: list[TokenStream] = []
    rejected: list[QueueFull] = []

    def submit_some() -> None:
        for _ in range(25):
            try:
                accepted.append(submit(engine))
            except QueueFull as error:
                rejected.append(error)

    threads = [threading.Thread(target=submit_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        wait_for(thread)
    assert (len(accepted), len(rejected)) == (10, 190)
    finish(engine)
    assert [stream.request.text for stream in accepted] == ["a"] * 10


def test_several_replies_compute_their_prompt_once_and_use_successive_seeds() -> None:
    checkpoint = Checkpoint.of(tiny_llama(vocab_size=258), byte_tokenizer())
    params = SamplingParams(seed=5, temperature=2.0, max_new_tokens=8)
    engine = engine_of(checkpoint, slots=4, max_waiting=0)
    together = engine.submit_several([PROMPT], params, 4, "r")
    assert [stream.id for stream in together] == ["r", "r#1", "r#2", "r#3"]
    finish(engine)
    cached = [stream.request.num_cached_tokens for stream in together]
    assert cached == [0, *[len(PROMPT) - 1] * 3]
    replies = [stream.request.output_ids for stream in together]
    for n, ids in enumerate(replies):
        alone = engine_of(checkpoint, slots=1)
        stream = alone.submit(PROMPT, params.model_copy(update={"seed": 5 + n}))
        finish(alone)
        assert stream.request.output_ids == ids
    assert len(set(map(tuple, replies))) > 1


def test_several_replies_are_accepted_together_or_not_at_all(engine: Engine) -> None:
    submit(engine, "x#1")
    with pytest.raises(QueueFull):
        engine.submit_several([PROMPT], SamplingParams(), 4)
    with pytest.raises(DuplicateRequest):
        engine.submit_several([PROMPT], SamplingParams(), 2, "x")
    assert len(engine.submit_several([PROMPT], SamplingParams(), 3)) == 3


def test_streams_for_several_prompts_are_ordered_by_prompt() -> None:
    def echo(ids: list[int]) -> int:
        return ids[0] if len(ids) < 13 else 256

    engine = engine_of(fake_checkpoint(echo), slots=4)
    streams = engine.submit_several([[65, *PROMPT], [66, *PROMPT]], SamplingParams(), 2, "r")
    finish(engine)
    assert [text(s) for s in streams] == ["AA", "AA", "BB", "BB"]
    assert [s.id for s in streams] == ["r", "r#1", "r#2", "r#3"]


def test_more_replies_than_slots_and_queue_hold_are_an_invalid_request(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="5 replies were requested, but only 4"):
        engine.submit_several([PROMPT], SamplingParams(), 5)


def test_the_tokens_of_waiting_prompts_are_limited() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=1, max_waiting=100)
    long = [1] * 500
    taken = []
    with pytest.raises(QueueFull, match=r"tokens together, but only \d+ may wait; try"):
        for _ in range(100):
            taken.append(engine.submit(long, SamplingParams()))
    assert sum(len(s.request.prompt_ids) for s in taken) <= engine.intake.waiting_tokens
    assert len(taken) == engine.intake.waiting_tokens // 500
    finish(engine)
    engine.submit(long, SamplingParams())


def test_racing_submits_exceed_neither_the_request_limit_nor_the_token_limit() -> None:
    engine = engine_of(fake_checkpoint(says("abc")), slots=4, max_waiting=300)
    rejected = []

    def submit_some() -> None:
        rng = random.Random(threading.get_ident())
        for _ in range(625):
            try:
                engine.submit([1] * rng.randrange(1, 100), SamplingParams())
            except QueueFull:
                rejected.append(1)
            assert engine.waiting <= 304
            tokens = sum(len(request.prompt_ids) for request in engine.requests)
            assert tokens <= engine.intake.waiting_tokens

    with ThreadPoolExecutor(16) as pool:
        for racing in [pool.submit(submit_some) for _ in range(16)]:
            racing.result()  # raises the errors of the thread
    assert len(rejected) + engine.waiting == 10_000

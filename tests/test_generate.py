"""`stream_generate` yields text, from a model and a tokenizer or from a checkpoint."""

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError
from support.engines import finish
from support.fakes import (
    END,
    FakeModel,
    Gate,
    byte_tokenizer,
    fake_checkpoint,
    is_complete_prompt,
    reply_length,
    says,
)
from support.models import build, counting, tiny_llama
from support.waiting import wait_for

from stream_generator.engine.engine import Engine
from stream_generator.errors import (
    EngineClosed,
    InvalidRequest,
    PromptTooLong,
)
from stream_generator.generate import stream_generate
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import FinishReason, TokenOutput
from stream_generator.sampling_params import SamplingParams


def test_stream_generate_yields_text_and_ends_with_the_reason() -> None:
    fake = fake_checkpoint(says("彩虹 🌈!"))
    outputs = list(stream_generate(fake.model, fake.tokenizer, [{"role": "user", "content": "?"}]))
    assert "".join(o.delta for o in outputs) == "彩虹 🌈!"
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_stream_generate_takes_ids_and_stops_at_the_maximum_length() -> None:
    fake = fake_checkpoint(says("abcdef"), context_length=20)
    ids = fake.tokenizer.encode("assistant:")
    outputs = list(stream_generate(fake.model, fake.tokenizer, ids, max_new_tokens=3))
    assert "".join(o.delta for o in outputs) == "abc"
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    outputs = list(stream_generate(fake.model, fake.tokenizer, [7] * 10 + ids[-10:-1]))
    assert outputs[-1].finish_reason is FinishReason.LENGTH, "the context ends the reply"
    assert len(outputs) == 1


def test_stop_strings_and_stop_ids_finish_a_reply_and_are_not_shown() -> None:
    fake = fake_checkpoint(says("one two three"))
    messages = [{"role": "user", "content": "count"}]
    for params in ({"stop": "two"}, {"stop": ["xyz", "two t"]}, {"stop_token_ids": [ord("t")]}):
        outputs = list(stream_generate(fake.model, fake.tokenizer, messages, **params))
        assert "".join(o.delta for o in outputs) == "one "
        assert outputs[-1].finish_reason is FinishReason.STOP


def test_stream_generate_applies_penalties_and_biases() -> None:
    """The fake model prefers one id by 50, so only biases and penalties above 50 matter."""
    fake = fake_checkpoint(lambda ids: ord("a"))
    ids = fake.tokenizer.encode("x")

    def text(**params: Any) -> str:
        params = {"max_new_tokens": 4, "temperature": 0, **params}
        return "".join(o.delta for o in stream_generate(fake.model, fake.tokenizer, ids, **params))

    assert text() == "aaaa"
    assert text(logit_bias={str(ord("b")): 60}) == "bbbb"
    assert text(logit_bias={ord("a"): -60, ord("b"): 0.5, END: -100}) == "bbbb"
    assert text(no_repeat_ngram_size=2, logit_bias={ord("b"): 1}) == "aaba"
    # 25 times 2 is 50; then the bias of 0.5 makes "b" the twenty-sixth id.
    long = text(frequency_penalty=2.0, max_new_tokens=26, logit_bias={ord("b"): 0.5})
    assert long == "a" * 25 + "b"


def test_greedy_text_of_the_demo_model_equals_that_of_transformers(demo: Any) -> None:
    messages = [{"role": "user", "content": "Name three colours of the rainbow."}]
    outputs = list(
        stream_generate(demo.model, demo.tokenizer, messages, temperature=0, max_new_tokens=32)
    )
    ids = demo.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    whole = demo.model.generate(**ids, do_sample=False, max_new_tokens=32)
    new = whole[0, ids["input_ids"].shape[1] :]
    assert "".join(o.delta for o in outputs) == demo.tokenizer.decode(new, skip_special_tokens=True)


def test_limits_in_a_generation_config_do_not_shorten_a_reply() -> None:
    fake = fake_checkpoint(says("abcdefgh"))
    fake.model.generation_config.max_new_tokens = 4
    fake.model.generation_config.max_time = 0.0
    ids = fake.tokenizer.encode("assistant:")
    outputs = list(stream_generate(fake.model, fake.tokenizer, ids, max_new_tokens=6))
    assert "".join(o.delta for o in outputs) == "abcdef"
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_model_without_an_end_id_generates_up_to_the_maximum_length() -> None:
    model, tokenizer = tiny_llama(vocab_size=258), byte_tokenizer()
    tokenizer.eos_token = None
    outputs = list(stream_generate(model, tokenizer, [5, 6, 7], max_new_tokens=4))
    assert [output.finish_reason for output in outputs][-1] is FinishReason.LENGTH
    assert len(outputs) == 4


def test_stream_generate_rejects_a_bad_request_before_any_forward() -> None:
    model = FakeModel(says("x"), context_length=8)
    forwards = counting(model)
    tokenizer = byte_tokenizer()
    with pytest.raises(PromptTooLong, match="prompt has 8 tokens but the context holds 8"):
        stream_generate(model, tokenizer, [1] * 8)
    with pytest.raises(InvalidRequest, match="empty"):
        stream_generate(model, tokenizer, [])
    with pytest.raises(InvalidRequest, match="vocabulary"):
        stream_generate(model, tokenizer, [1, 258])
    with pytest.raises(InvalidRequest, match="vocabulary"):
        stream_generate(model, tokenizer, [1], stop_token_ids=[4000])
    with pytest.raises(ValidationError):
        stream_generate(model, tokenizer, [1], temperature=-1)
    with pytest.raises(ValidationError):
        stream_generate(model, tokenizer, [1], temprature=1)
    assert forwards() == 0


def random_checkpoint() -> Checkpoint:
    return Checkpoint.of(tiny_llama(), byte_tokenizer())


def test_replies_equal_the_engines_whether_read_in_turn_or_by_threads() -> None:
    checkpoint = random_checkpoint()
    asked = [{"max_new_tokens": 9 + n, "temperature": 1.0, "seed": n} for n in range(6)]
    engine = Engine(checkpoint)
    streams = [engine.submit([5, 6, 7], SamplingParams(**fields)) for fields in asked]
    finish(engine)
    expected = [list(stream) for stream in streams]

    replies = [stream_generate(checkpoint, [5, 6, 7], **fields) for fields in asked]
    in_turn: list[list[TokenOutput]] = [[] for _ in asked]
    for _ in range(20):
        for outputs, reply in zip(in_turn, replies, strict=True):
            outputs.extend(itertools.islice(reply, 1))
    assert in_turn == expected

    with ThreadPoolExecutor(max_workers=len(asked)) as pool:
        together = pool.map(lambda f: list(stream_generate(checkpoint, [5, 6, 7], **f)), asked)
    assert list(together) == expected


def test_replies_that_are_read_at_the_same_time_are_computed_together() -> None:
    checkpoint = random_checkpoint()
    list(stream_generate(checkpoint, [5, 6, 7], max_new_tokens=2))  # this creates its engine
    forwards = counting(checkpoint.model)
    fields: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20}
    replies = [stream_generate(checkpoint, [5, 6, n], **fields) for n in range(8, 12)]
    for outputs in zip(*replies, strict=True):
        assert all(outputs)
    assert forwards() == 4 + 19 + 3, "4 prompts, 19 shared steps, 3 for the last reply alone"

    before = forwards()
    with ThreadPoolExecutor(max_workers=4) as pool:
        replies = [stream_generate(checkpoint, [9, 6, n], **fields) for n in range(8, 12)]
        assert [len(outputs) for outputs in pool.map(list, replies)] == [20] * 4
    assert forwards() - before < 4 * 20


def test_stream_generate_serves_more_replies_than_its_queue_holds() -> None:
    checkpoint = random_checkpoint()
    replies = [stream_generate(checkpoint, [5, 6, 7], max_new_tokens=9) for _ in range(60)]
    for reply in replies:
        next(reply)
    assert {len(list(reply)) for reply in replies} == {8}


def test_reading_a_queued_token_does_not_wait_for_another_readers_step() -> None:
    gate = Gate(says("abcdef"))
    checkpoint = fake_checkpoint(gate)
    messages = [{"role": "user", "content": "?"}]
    gate.allow(5)
    one, other = (stream_generate(checkpoint, messages) for _ in range(2))
    assert [next(reply).delta for reply in (one, other, one, one)] == ["a", "a", "b", "c"]
    for _ in range(5):
        wait_for(gate.arrived)
    with ThreadPoolExecutor(max_workers=1) as pool:
        fourth = pool.submit(next, one)
        wait_for(gate.arrived)  # a step now computes until the gate opens
        assert next(other).delta == "b"
        gate.allow(100)
        assert fourth.result().delta == "d"


def test_an_interrupted_step_fails_the_open_replies_but_no_later_one() -> None:
    interrupts = [KeyboardInterrupt()]

    def next_id(ids: list[int]) -> int:
        if reply_length(ids) == 2 and is_complete_prompt(ids) and interrupts:
            raise interrupts.pop()
        return says("abcdef")(ids)

    checkpoint = fake_checkpoint(next_id)
    messages = [{"role": "user", "content": "?"}]
    one, other = (stream_generate(checkpoint, messages) for _ in range(2))
    assert next(one).delta + next(other).delta == "aa"
    with pytest.raises(KeyboardInterrupt):
        list(one)
    with pytest.raises(EngineClosed, match="interrupted"):
        list(other)
    assert "".join(o.delta for o in stream_generate(checkpoint, messages)) == "abcdef"


def test_a_closed_or_unread_reply_is_not_computed() -> None:
    checkpoint = random_checkpoint()
    left = stream_generate(checkpoint, [5, 6, 7], max_new_tokens=1000)
    next(left)
    left.close()
    stream_generate(checkpoint, [5, 6, 7])
    list(stream_generate(checkpoint, [8, 9], max_new_tokens=2))
    rows: list[int] = []
    checkpoint.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    list(stream_generate(checkpoint, [5, 6, 7], max_new_tokens=3))
    assert rows == [1, 1, 1], "no other reply has a row in these forwards"


def test_an_unused_checkpoint_is_garbage_collected() -> None:
    checkpoint = random_checkpoint()
    list(stream_generate(checkpoint, [5, 6, 7], max_new_tokens=3))
    gone = weakref.ref(checkpoint)
    del checkpoint
    gc.collect()
    assert gone() is None


def test_stream_generate_rejects_at_once_what_a_checkpoint_cannot_serve() -> None:
    checkpoint = random_checkpoint()
    with pytest.raises(PromptTooLong):
        stream_generate(checkpoint, [1] * 10_000)
    with pytest.raises(ValidationError):
        stream_generate(checkpoint, [1], temperature=-1)
    with pytest.raises(TypeError):
        stream_generate(checkpoint, [1], SamplingParams(), temperature=1)
    with pytest.raises(TypeError):
        stream_generate(checkpoint)  # type: ignore[call-overload]
    alone = Checkpoint.of(build("mamba"), byte_tokenizer())
    with pytest.raises(InvalidRequest, match="log-probabilities"):
        stream_generate(alone, [1], logprobs=1)


def test_stream_generate_runs_packed_weights_on_their_graph(demo: Checkpoint) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    fields: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "logprobs": 1}
    engine = Engine(demo)
    stream = engine.submit(demo.chat.encode(messages), SamplingParams(**fields))
    finish(engine)
    reply = list(stream_generate(demo, messages, **fields))
    assert reply == list(stream)
    choice = reply[0].choice
    assert choice is not None
    assert choice.logprob is not None, "only the graph gives log-probabilities here"


def test_min_new_tokens_works_if_an_end_id_is_outside_the_vocabulary() -> None:
    checkpoint = random_checkpoint()
    assert max(checkpoint.end_ids) >= checkpoint.vocab_size
    fields: dict[str, Any] = {"min_new_tokens": 3, "max_new_tokens": 5, "temperature": 0}
    assert len(list(stream_generate(checkpoint, [5, 6, 7], **fields))) == 5

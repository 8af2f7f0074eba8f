"""A failing request fails alone; a failing engine reports its failure to every reader."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.engines import PROMPT, engine_of, finish, submit, text
from support.fakes import byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama

from stream_generator.engine.engine import Engine
from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for, runner_of
from stream_generator.errors import (
    EngineClosed,
    GenerationFailed,
)
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import FinishReason
from stream_generator.sampling_params import SamplingParams


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("step", range(4))
def test_a_request_that_fails_fails_alone(step: int, slots: int) -> None:
    def next_id(ids: list[int]) -> int:
        if ids[:1] == [7] and len(ids) == 1 + len(PROMPT) + step:
            raise RuntimeError("secret path /home")
        return says("abc")(ids)

    engine = engine_of(fake_checkpoint(next_id), slots=slots)
    bad = engine.submit([7, *PROMPT], SamplingParams())
    good = submit(engine)
    finish(engine)
    received = []
    with pytest.raises(GenerationFailed, match="RuntimeError") as error:
        for output in bad:
            received.append(output.delta)
    assert "secret" not in str(error.value), "details belong in the log"
    assert received == ["a", "b", "c"][:step]
    assert text(good) == "abc"


class Failing:
    """Raises `error` in forwards that hold a row for which `hits` is true."""

    def __init__(self, error: BaseException, hits: Callable[[list[int]], bool]):
        self.error = error
        self.hits = hits

    def __call__(self, ids: list[int]) -> int:
        if self.hits(ids):
            raise self.error
        return says("abc")(ids)


def test_when_memory_is_short_only_the_newest_request_fails() -> None:
    shortage: list[bool] = []

    def hits(ids: list[int]) -> bool:
        return bool(shortage and shortage.pop())

    error = torch.OutOfMemoryError("CUDA out of memory, at 0x7f")
    engine = engine_of(fake_checkpoint(Failing(error, hits)), slots=3)
    streams = [submit(engine) for _ in range(3)]
    for _ in range(3):
        engine.step()
    shortage.append(True)
    finish(engine)
    with pytest.raises(GenerationFailed, match="out of memory; shorten"):
        text(streams[-1])
    assert [text(s) for s in streams[:-1]] == ["abc", "abc"]


def test_a_step_that_fails_once_fails_no_request() -> None:
    """Each request succeeds when the engine tries it alone."""
    failures = iter([True])

    def hits(ids: list[int]) -> bool:
        return bytes(ids[-1:]) == b"b" and next(failures, False)

    engine = engine_of(fake_checkpoint(Failing(RuntimeError("once"), hits)), slots=3)
    streams = [submit(engine) for _ in range(3)]
    finish(engine)
    assert [text(s) for s in streams] == ["abc"] * 3


@pytest.mark.parametrize("step", range(6))
def test_nan_in_one_row_fails_that_request_alone_and_damages_no_slot(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real attention: 0 times NaN is NaN, so the engine must wipe a failed slot."""
    model = tiny_llama(vocab_size=258)
    untouched = copy.deepcopy(model)
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    runner = runner_for(model, 256, max_concurrent=2)
    assert isinstance(runner, ModelRunner)
    engine = Engine(checkpoint, runner=runner)
    params = SamplingParams(temperature=0, max_new_tokens=12)
    bad = engine.submit([200] * 9, params)
    good = engine.submit([7, 8, 9], params)

    rows: list[Any] = []  # the requests of the current forward
    forward = runner.forward

    def record_rows(requests: Any, new_ids: list[list[int]]) -> torch.Tensor:
        rows[:] = requests
        return forward(requests, new_ids)

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Spoil the row of the bad request."""
        if bad.request in rows and len(bad.request.output_ids) >= step:
            output = output.clone()
            output[rows.index(bad.request)] = torch.nan
        return output

    monkeypatch.setattr(runner, "forward", record_rows)
    handle = model.model.layers[0].register_forward_hook(poison)
    finish(engine)
    handle.remove()
    with pytest.raises(GenerationFailed, match="NaN"):
        text(bad)
    expected = untouched.generate(torch.tensor([[7, 8, 9]]), do_sample=False, max_new_tokens=12)
    assert good.request.output_ids == expected[0, 3:].tolist()
    after = engine.submit([7, 8, 9], params)
    beside = engine.submit([5] * 40, params)
    finish(engine)
    assert after.request.output_ids == expected[0, 3:].tolist()
    assert beside.request.finish_reason is FinishReason.LENGTH


def test_a_tokenizer_that_fails_on_one_reply_fails_that_request_alone() -> None:
    checkpoint = fake_checkpoint(says("abc"))
    engine = engine_of(checkpoint, slots=2)
    bad, good = submit(engine), submit(engine)

    class Broken:
        def decode(self, token_id: int) -> str:
            raise TypeError("secret")

        flush = decode

    bad.request.detokenizer = Broken()  # type: ignore[assignment]
    finish(engine)
    with pytest.raises(GenerationFailed, match="TypeError"):
        text(bad)
    assert text(good) == "abc"


def test_a_repeated_step_draws_the_same_numbers() -> None:
    """The failed step has already drawn a number for each request."""
    model = tiny_llama(vocab_size=258)
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    params = SamplingParams(seed=5, temperature=2.0, max_new_tokens=12)
    replies = []
    for fails in (False, True):
        runner = runner_for(model, 256, max_concurrent=2)
        engine = Engine(checkpoint, runner=runner)
        streams = [engine.submit([1, 2, n], params) for n in (3, 4)]
        decode, failures = runner.decode, [fails]

        def fail_once(requests: Any, decode: Any = decode, failures: Any = failures) -> Any:
            result = decode(requests)
            if len(requests) == 2 and failures and failures.pop():
                for request in requests:
                    request.num_computed_tokens -= 1
                raise RuntimeError
            return result

        runner.decode = fail_once  # type: ignore[method-assign]
        finish(engine)
        replies.append([s.request.output_ids for s in streams])
    assert replies[0] == replies[1]


@pytest.mark.parametrize("when", ["prompt", "reply"])
def test_a_lost_device_fails_the_engine_and_every_request(when: str) -> None:
    """After an illegal access, for example, no GPU operation of the process succeeds."""

    def next_id(ids: list[int]) -> int:
        if when == "prompt" or ids[-1] == ord("a"):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return ord("a")

    def after_the_probe(ids: list[int]) -> int:
        return (
            next_id(ids) if bytes(i for i in ids if i < 256).endswith(b":") or ids[-1] == 97 else 1
        )

    checkpoint = fake_checkpoint(after_the_probe)
    runner = runner_of(checkpoint, max_concurrent=2)
    engine = Engine(checkpoint, runner=runner)

    def fails_too(*args: Any, **kwargs: Any) -> None:
        raise torch.AcceleratorError("CUDA error: the device is lost")

    runner.release = fails_too  # type: ignore[method-assign]
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

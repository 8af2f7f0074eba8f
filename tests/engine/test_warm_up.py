"""Warm-up measures the speed of one stream and leaves nothing behind."""

import math

import pytest
import torch
from support.fakes import END, FakeModel, byte_tokenizer, fake_checkpoint, says
from support.models import tiny_llama

from stream_generator.engine.engine import Engine
from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for
from stream_generator.engine.solo_runner import SoloRunner
from stream_generator.engine.warm_up import tokens_per_second
from stream_generator.loaded_model import Checkpoint
from stream_generator.sampling_params import SamplingParams


def runner_of(checkpoint: Checkpoint) -> ModelRunner:
    runner = runner_for(checkpoint.model, checkpoint.context_length, max_concurrent=2)
    assert isinstance(runner, ModelRunner)
    return runner


def test_warm_up_measures_at_least_one_token_whatever_the_model_replies() -> None:
    for next_id in (lambda ids: END, lambda ids: ord("a")):
        checkpoint = fake_checkpoint(next_id)
        speed = tokens_per_second(checkpoint, runner_of(checkpoint), seconds=0)
        assert speed is not None
        assert 0 < speed < math.inf


def test_warm_up_works_in_a_context_of_a_few_tokens() -> None:
    checkpoint = fake_checkpoint(says("abc"), context_length=24)
    assert tokens_per_second(checkpoint, runner_of(checkpoint)) is not None


def test_warm_up_measures_a_model_that_runs_one_request_at_a_time() -> None:
    checkpoint = fake_checkpoint(says("abc"))
    runner = SoloRunner(checkpoint.model, 512)
    assert tokens_per_second(checkpoint, runner, seconds=0) is not None
    stream = Engine(checkpoint, runner=runner).start().submit([*b"assistant:"], SamplingParams())
    assert "".join(output.delta for output in stream) == "abc"


def test_warm_up_logs_an_error_and_gives_no_speed(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeModel):
        def next_of(self, ids: list[int]) -> int:
            if len(ids) > 17:
                raise RuntimeError("out of order")
            return super().next_of(ids)

    checkpoint = Checkpoint.of(Broken(says("")), byte_tokenizer())
    assert tokens_per_second(checkpoint, runner_of(checkpoint)) is None
    assert "the speed could not be measured: out of order" in caplog.text


def test_warm_up_logs_nan_logits_and_gives_no_speed(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(vocab_size=258)
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    runner = runner_of(checkpoint)
    torch.nn.init.constant_(model.get_output_embeddings().weight, math.nan)
    assert tokens_per_second(checkpoint, runner) is None
    assert "NaN" in caplog.text


def test_warm_up_leaves_nothing_in_the_prefix_cache() -> None:
    checkpoint = Checkpoint.of(tiny_llama(vocab_size=258), byte_tokenizer())
    prompt, params = list(range(12)), SamplingParams(max_new_tokens=8, seed=1)

    def first_reply(*, measured: bool) -> tuple[list[int], int]:
        runner = runner_of(checkpoint)
        if measured:
            tokens_per_second(checkpoint, runner, seconds=0)
        engine = Engine(checkpoint, runner=runner)
        stream = engine.submit(prompt, params)
        while engine.step():
            pass
        return stream.request.output_ids, stream.request.num_cached_tokens

    ids, cached = first_reply(measured=True)
    assert (ids, cached) == first_reply(measured=False)
    assert cached == 0

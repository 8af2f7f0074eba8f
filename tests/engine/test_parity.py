"""The ids of a request do not depend on the requests beside it.

The reference is the loop of `stream_generate`, run alone on an untouched copy of the model. The
last bits of a sum depend on the shape of the batch. A first difference is therefore allowed where
these bits decide: the two best scores are within 1e-4, or the drawn number is within 1e-4 of the
boundary between two ids.
"""

import copy
import random
from typing import Any

import pytest
import torch
from support.fakes import byte_tokenizer
from support.models import DEVICE, build, random_params, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from stream_generator.engine.engine import Engine
from stream_generator.engine.model_runner import ModelRunner
from stream_generator.engine.runners import runner_for
from stream_generator.engine.solo_runner import SoloRunner
from stream_generator.loaded_model import Checkpoint
from stream_generator.loading.layout import locate
from stream_generator.loop import stream_request
from stream_generator.model.fused import FusedLayer, fuse
from stream_generator.request import FinishReason, Request
from stream_generator.sampling.processors import ADJUST, RESTRICT, processors
from stream_generator.sampling.sampler import generator_for, uniform
from stream_generator.sampling_params import SamplingParams
from stream_generator.text.chat import Message

CLOSE = 1e-4


def alone(reference: Checkpoint, request: Request) -> tuple[list[int], FinishReason | None]:
    """Run the same request alone, through transformers' `generate`."""
    params = request.params.model_copy(update={"logprobs": None})
    again = reference.new_request(request.prompt_ids, params, request_id=request.id)
    for _ in stream_request(reference.model, again):
        pass
    return again.output_ids, again.finish_reason


def assert_same(reference: Checkpoint, request: Request, where: str = "") -> bool:
    """Check that ids are equal or differ as allowed above; return whether they are equal."""
    ids, reason = alone(reference, request)
    if ids == request.output_ids:
        assert reason is request.finish_reason, where
        return True
    at = next(
        n
        for n in range(max(len(ids), len(request.output_ids)) + 1)
        if ids[n : n + 1] != request.output_ids[n : n + 1]
    )
    margin = margin_at(reference, request, at)
    assert margin < CLOSE, f"{where}: id {at} differs where the choice was clear by {margin}"
    return False


def margin_at(reference: Checkpoint, request: Request, at: int) -> float:
    """How clear the choice of output id `at` was, by a plain forward over the ids before it."""
    before = reference.new_request(request.prompt_ids, request.params, request_id="margin")
    before.output_ids = request.output_ids[:at]
    with torch.inference_mode():
        inputs = torch.tensor([before.all_ids], device=reference.model.device)
        scores = reference.model(input_ids=inputs).logits[:, -1].float()
        scores = processors(ADJUST, before)(inputs, scores)
    if request.params.greedy:
        best = scores[0].topk(2).values
        return float(best[0] - best[1])
    probabilities = torch.softmax(
        processors(RESTRICT, before)(inputs, scores)[0].double().cpu(), dim=-1
    )
    generator = generator_for(request.params.seed or 0)
    number = [uniform(generator) for _ in range(at + 1)][-1]
    return float((probabilities.cumsum(0) - number).abs().min())


def own_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Keep transformers' own layers."""
    return model


def fused(model: PreTrainedModel) -> PreTrainedModel:
    assert fuse(model)
    assert all(isinstance(layer, FusedLayer) for layer in model.base_model.layers)
    return model


BATCHED = [
    "llama", "llama ungrouped", "llama tied",
    "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi3",
]  # fmt: skip
LAYERS = {"own layers": own_layers, "fused": fused}
FUSIBLE = ["llama", "llama ungrouped", "llama tied", "mistral", "qwen2", "qwen3"]
CASES = [
    *((name, "own layers") for name in BATCHED),
    *((name, "fused") for name in FUSIBLE),
]


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_32_overlapping_requests_get_the_ids_they_would_get_alone(name: str, layers: str) -> None:
    untouched = build(name)
    model = LAYERS[layers](copy.deepcopy(untouched))
    reference = Checkpoint.of(untouched, byte_tokenizer())
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    runner = runner_for(model, checkpoint.context_length, max_concurrent=6)
    assert isinstance(runner, ModelRunner)
    engine = Engine(checkpoint, runner=runner, max_waiting=100)
    rng = random.Random(name)
    shared = [rng.randrange(258) for _ in range(30)]  # prompts share it, so slots are copied
    arrivals = sorted(rng.randrange(60) for _ in range(32))
    requests: list[Request] = []
    step, busy = 0, True
    while arrivals or busy:
        while arrivals and arrivals[0] <= step:
            arrivals.pop(0)
            own = [rng.randrange(258) for _ in range(rng.randrange(1, 60))]
            prompt = shared[: rng.choice([0, 0, 12, 30])] + own
            params = SamplingParams(**random_params(rng))
            requests.append(engine.submit(prompt, params).request)
        busy = engine.step()
        step += 1
    assert len(requests) == 32
    assert any(r.num_cached_tokens for r in requests), "some prefixes were cached"
    equal = [assert_same(reference, s, f"{name}, request {n}") for n, s in enumerate(requests)]
    assert sum(equal) > 24, "ties are rare, so most replies are equal"


@pytest.mark.parametrize("name", ["mamba", "gemma2"])
def test_a_model_that_does_not_fit_the_slot_cache_runs_one_request_at_a_time(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Mamba has recurrent layers; the attention of Gemma 2 has a soft cap."""
    model = build(name)
    reference = Checkpoint.of(copy.deepcopy(model), byte_tokenizer())
    checkpoint = Checkpoint.of(model, byte_tokenizer())
    runner = runner_for(model, 256)
    if name == "mamba":  # whether a soft cap fits depends on the version of transformers
        assert isinstance(runner, SoloRunner)
    assert isinstance(runner, ModelRunner) or "runs one request at a time" in caplog.text
    engine = Engine(checkpoint, runner=runner)
    rng = random.Random(1)
    requests = [
        engine.submit(
            [1, 2, 3, *(rng.randrange(258) for _ in range(n))], SamplingParams(**random_params(rng))
        ).request
        for n in range(1, 6)
    ]
    requests.append(engine.submit(requests[-1].prompt_ids, SamplingParams(seed=1)).request)
    while engine.step():
        pass
    for request in requests:
        assert_same(reference, request, name)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        {"suppress_tokens": [5]},
    ],
    ids=["dynamic rope", "suppressed tokens"],
)
def test_settings_that_rows_cannot_share_run_one_request_at_a_time(change: dict[str, Any]) -> None:
    model = tiny_llama(vocab_size=258, **{k: v for k, v in change.items() if "rope" in k})
    model.generation_config.suppress_tokens = change.get("suppress_tokens")
    assert isinstance(runner_for(model, 256), SoloRunner)


def test_greedy_replies_equal_transformers_generate_with_a_cold_and_a_warm_prefix_cache() -> None:
    model = build("llama")
    untouched = copy.deepcopy(model)
    engine = Engine(
        Checkpoint.of(model, byte_tokenizer()), runner=runner_for(model, 256, max_concurrent=3)
    )
    prompt = [random.Random(3).randrange(258) for _ in range(50)]
    whole = untouched.generate(
        torch.tensor([prompt], device=DEVICE), max_new_tokens=20, do_sample=False
    )
    expected = whole[0, len(prompt) :].tolist()
    for cached in (0, 49, 49):
        request = engine.submit(prompt, SamplingParams(temperature=0, max_new_tokens=20)).request
        while engine.step():
            pass
        assert request.num_cached_tokens == cached
        assert request.output_ids == expected


@pytest.mark.parametrize("name", ["gemma", "gemma3", "phi3"])
def test_a_model_of_an_unsupported_shape_keeps_its_own_layers(name: str) -> None:
    model = build(name)
    layers = list(model.base_model.layers)
    assert not fuse(model)
    assert list(model.base_model.layers) == layers


def test_eight_parallel_chats_get_the_replies_they_would_get_alone(demo: Checkpoint) -> None:
    """The demo model in float32. Each turn finds its history in the prefix cache."""
    untouched = AutoModelForCausalLM.from_pretrained(
        locate(None).dense_directory(), dtype=torch.float32
    )
    reference = Checkpoint.of(untouched, demo.tokenizer)
    model = fused(copy.deepcopy(untouched))
    checkpoint = Checkpoint.of(model, demo.tokenizer)

    def new_engine() -> Engine:
        runner = runner_for(model, 8192, max_concurrent=8, max_context=1024)
        return Engine(checkpoint, runner=runner)

    warm = new_engine()
    topics = ["rain", "bread", "bees", "iron", "music", "the moon", "chess", "paper"]
    chats: list[list[Message]] = [[] for _ in topics]
    equal: list[bool] = []
    for turn in range(10):
        for topic, chat in zip(topics, chats, strict=True):
            chat.append({"role": "user", "content": f"Fact {turn + 1} about {topic}, please."})
        prompts = [checkpoint.chat.encode(chat) for chat in chats]
        params = SamplingParams(temperature=0, max_new_tokens=5)
        requests = [warm.submit(prompt, params).request for prompt in prompts]
        while warm.step():
            pass
        for chat, request in zip(chats, requests, strict=True):
            if turn:
                assert request.num_cached_tokens > 0.8 * (len(request.prompt_ids) - 25)
            chat.append({"role": "assistant", "content": request.text})
        if turn in (3, 9):
            cold = new_engine()
            again = [cold.submit(prompt, params).request for prompt in prompts]
            while cold.step():
                pass
            for one, other in zip(requests, again, strict=True):
                equal.append(assert_same(reference, one))
                if other.output_ids != one.output_ids:
                    equal.append(assert_same(reference, other))
    assert sum(equal) > 0.9 * len(equal)

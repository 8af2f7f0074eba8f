"""`stream_sample` yields the ids of transformers' own loop, one step at a time."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import PAD, counting, generated, prompts, tiny_llama
from support.waiting import wait_for
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LogitsProcessorList,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from stream_generator.errors import (
    GenerationFailed,
    InvalidRequest,
)
from stream_generator.loop import stream_sample

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}

ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def family(name: str) -> PreTrainedModel:
    """A tiny random model of this family, in float32."""
    if name.startswith("llama"):
        return tiny_llama(
            num_key_value_heads=4 if "ungrouped" in name else 2,
            tie_word_embeddings="tied" in name,
        )
    torch.manual_seed(0)
    config = {
        "mistral": lambda: MistralConfig(**SMALL, **ATTENTION, sliding_window=8),
        "qwen2": lambda: Qwen2Config(**SMALL, **ATTENTION),
        "gpt2": lambda: GPT2Config(
            vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        "mamba": lambda: MambaConfig(**SMALL, state_size=8),
    }[name]()  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


FAMILIES = ["llama", "llama ungrouped", "llama tied", "mistral", "qwen2", "gpt2", "mamba"]


def stream_ids(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """All ids of a stream: [rows, steps]."""
    steps = list(model.generate(**inputs, custom_generate=stream_sample, **options))
    assert all(step.shape == (len(steps[0]),) for step in steps)
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(7,), (3, 9, 5)], ids=["alone", "batch"])
def test_a_greedy_stream_equals_generate_id_for_id(name: str, lengths: tuple[int, ...]) -> None:
    model = family(name)
    options = {"do_sample": False, "max_new_tokens": 24}
    inputs = prompts(*lengths)
    assert stream_ids(model, inputs, **options).equal(generated(model, inputs, **options))


def test_a_greedy_stream_equals_generate_with_processors_and_without_cache() -> None:
    model = tiny_llama(eos_token_id=[5, 6])
    inputs = prompts(6, 2)
    for options in (
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 10},
        {"use_cache": False},
        {"suppress_tokens": [7, 8, 9]},
        {"cache_implementation": "static"},
    ):
        options = {"do_sample": False, "max_new_tokens": 20, **options}
        ours, theirs = stream_ids(model, inputs, **options), generated(model, inputs, **options)
        assert ours.equal(theirs), options


class ForceIds:
    """A processor that forces the id `schedule[step][row]`, and forbids end ids elsewhere."""

    def __init__(self, schedule: dict[int, dict[int, int]], prompt_length: int):
        self.schedule = schedule
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        scores[:, [5, 6]] = -torch.inf
        for row, token in self.schedule.get(step, {}).items():
            scores[row] = -torch.inf
            scores[row, token] = 0.0
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_each_of_two_end_ids_ends_a_row_and_all_ids_are_in_the_vocabulary(do_sample: bool) -> None:
    model = tiny_llama(eos_token_id=[5, 6])
    inputs = prompts(4, 4, 4)
    force = ForceIds({2: {0: 5}, 4: {1: 6}, 7: {2: 5}}, prompt_length=4)
    ids = stream_ids(
        model,
        inputs,
        do_sample=do_sample,
        max_new_tokens=50,
        logits_processor=LogitsProcessorList([force]),
    )
    assert ids.shape == (3, 8), "the loop ends when every row has ended"
    assert ((ids >= 0) & (ids < 128)).all()
    for row, (end, step) in enumerate([(5, 2), (6, 4), (5, 7)]):
        assert ids[row, step] == end
        assert (ids[row, step + 1 :] == PAD).all(), "a row that has ended yields the pad id"
        assert not any(int(i) in (5, 6) for i in ids[row, :step])


def test_without_a_usable_pad_id_an_end_id_or_0_pads_a_row() -> None:
    for pad, expected in ((None, 6), (-1, 0), (9999, 0)):
        model = tiny_llama(eos_token_id=[6, 5], pad_token_id=None)
        config = GenerationConfig(
            eos_token_id=[6, 5], pad_token_id=pad, max_new_tokens=6, do_sample=False
        )
        force = LogitsProcessorList([ForceIds({0: {0: 5}, 4: {1: 6}}, prompt_length=4)])
        ids = stream_ids(model, prompts(4, 4), generation_config=config, logits_processor=force)
        assert ids[0].tolist() == [5, *[expected] * 4]


def test_return_sequences_differ_and_each_is_drawn_as_if_alone() -> None:
    model = tiny_llama()
    options = {"do_sample": True, "max_new_tokens": 16, "top_k": 0, "temperature": 1.5}
    together = stream_ids(model, prompts(6), num_return_sequences=3, seed=10, **options)
    assert together.shape[0] == 3
    assert len({tuple(row.tolist()) for row in together}) == 3
    for row in range(3):
        alone = stream_ids(model, prompts(6), seed=10 + row, **options)
        assert alone[0].equal(together[row])


def test_a_sampled_stream_follows_the_processors_and_torchs_seed() -> None:
    model = tiny_llama()
    options = {"do_sample": True, "max_new_tokens": 30}
    greedy = stream_ids(model, prompts(6), do_sample=False, max_new_tokens=30)
    assert stream_ids(model, prompts(6), top_k=1, **options).equal(greedy)
    torch.manual_seed(4)
    first = stream_ids(model, prompts(6), temperature=2.0, top_k=0, **options)
    torch.manual_seed(4)
    assert stream_ids(model, prompts(6), temperature=2.0, top_k=0, **options).equal(first)
    torch.manual_seed(5)
    assert not stream_ids(model, prompts(6), temperature=2.0, top_k=0, **options).equal(first)


def test_any_stopping_criterion_ends_the_stream() -> None:
    model = tiny_llama()

    def after_five(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 4 + 5)

    criteria = StoppingCriteriaList([after_five])
    ids = stream_ids(model, prompts(4), stopping_criteria=criteria, max_new_tokens=50)
    assert ids.shape == (1, 5)
    assert stream_ids(model, prompts(4), max_length=7).shape == (1, 3)


def test_the_loop_continues_a_cache_that_is_passed_in() -> None:
    model, inputs = tiny_llama(), prompts(9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :5], past_key_values=cache)
    expected = generated(model, inputs, do_sample=False, max_new_tokens=8)
    options = {"do_sample": False, "max_new_tokens": 8, "past_key_values": cache}
    assert stream_ids(model, inputs, **options).equal(expected)


def test_the_loop_yields_each_id_before_it_computes_the_next() -> None:
    model = tiny_llama()
    forwards = counting(model)
    steps = model.generate(**prompts(5), custom_generate=stream_sample, max_new_tokens=4)
    assert forwards() == 0
    for n, _ in enumerate(steps, start=1):
        assert forwards() == n
    assert forwards() == 4


def test_inference_mode_is_on_inside_the_loop_and_off_for_its_readers() -> None:
    seen: list[bool] = []

    def spy(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_inference_mode_enabled())
        return scores

    steps: Iterator[torch.Tensor] = tiny_llama().generate(
        **prompts(5),
        custom_generate=stream_sample,
        max_new_tokens=3,
        logits_processor=LogitsProcessorList([spy]),
    )
    outside = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: next(steps))
        thread.start()
        wait_for(thread)
        outside.append(torch.is_inference_mode_enabled())
    assert seen == [True] * 3
    assert outside == [False] * 3


def test_two_interleaved_streams_do_not_affect_each_other() -> None:
    model = tiny_llama()
    options = {"custom_generate": stream_sample, "do_sample": False, "max_new_tokens": 20}
    expected = [stream_ids(model, prompts(n), do_sample=False, max_new_tokens=20) for n in (3, 11)]
    pair = [model.generate(**prompts(n), **options) for n in (3, 11)]
    steps = list(zip(*pair, strict=True))
    for which in (0, 1):
        assert torch.stack([s[which] for s in steps], dim=1).equal(expected[which])


def test_nan_logits_end_the_stream_with_an_error() -> None:
    def poison(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan if input_ids.shape[1] == 7 else scores

    steps = tiny_llama().generate(
        **prompts(5),
        custom_generate=stream_sample,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([poison]),
    )
    assert len([next(steps), next(steps)]) == 2
    with pytest.raises(GenerationFailed):
        next(steps)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    ],
)
def test_the_loop_rejects_options_that_it_cannot_stream(options: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        tiny_llama().generate(
            **prompts(5), custom_generate=stream_sample, max_new_tokens=5, **options
        )
    assert named in str(error.value)


def test_the_loop_rejects_an_encoder_decoder_model() -> None:
    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(InvalidRequest, match="decoder-only"):
        T5ForConditionalGeneration(config).generate(
            torch.tensor([[5, 6]]), custom_generate=stream_sample, max_new_tokens=5
        )

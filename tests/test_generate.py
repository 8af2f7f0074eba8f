"""The loop: transformers' ids, one step at a time."""

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.fakes import (
    END,
    FakeModel,
    Gate,
    byte_tokenizer,
    fake_checkpoint,
    is_complete_prompt,
    reply_of,
    says,
)
from support.models import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
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

from stream_generator.engine.engine import Engine
from stream_generator.errors import (
    EngineClosed,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
)
from stream_generator.generate import _replies_of, init_stream_support, stream_generate
from stream_generator.loaded_model import Checkpoint
from stream_generator.loop import stream_sample
from stream_generator.request import FinishReason, TokenOutput
from stream_generator.sampling_params import SamplingParams

PAD, START = 0, 1

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
    """A tiny random model of each kind, in float32."""
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


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(2, 128, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def stream_ids(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """All that a stream yields, side by side: [rows, steps]."""
    steps = list(model.generate(**inputs, custom_generate=stream_sample, **options))
    assert all(step.shape == (len(steps[0]),) for step in steps)
    return torch.stack(steps, dim=1)


def generated(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """What transformers' own loop adds to the prompts: [rows, steps]."""
    whole = model.generate(**inputs, **options)
    return whole[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [(7,), (3, 9, 5)], ids=["alone", "batch"])
def test_greedy_equals_generate_token_for_token(name: str, lengths: tuple[int, ...]) -> None:
    model = family(name)
    options = {"do_sample": False, "max_new_tokens": 24}
    inputs = prompts(*lengths)
    assert stream_ids(model, inputs, **options).equal(generated(model, inputs, **options))


def test_greedy_equals_generate_with_processors_and_without_cache() -> None:
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


class Force:
    """Forces ids: `schedule[step][row]`; elsewhere an ordinary id."""

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
def test_each_of_two_end_ids_ends_a_row_and_no_id_leaves_the_vocabulary(do_sample: bool) -> None:
    model = tiny_llama(eos_token_id=[5, 6])
    inputs = prompts(4, 4, 4)
    force = Force({2: {0: 5}, 4: {1: 6}, 7: {2: 5}}, prompt_length=4)
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


def test_without_a_usable_pad_id_an_end_id_or_0_pads() -> None:
    for pad, expected in ((None, 6), (-1, 0), (9999, 0)):
        model = tiny_llama(eos_token_id=[6, 5], pad_token_id=None)
        config = GenerationConfig(
            eos_token_id=[6, 5], pad_token_id=pad, max_new_tokens=6, do_sample=False
        )
        force = LogitsProcessorList([Force({0: {0: 5}, 4: {1: 6}}, prompt_length=4)])
        ids = stream_ids(model, prompts(4, 4), generation_config=config, logits_processor=force)
        assert ids[0].tolist() == [5, *[expected] * 4]


def test_return_sequences_are_drawn_apart_and_each_as_if_alone() -> None:
    model = tiny_llama()
    options = {"do_sample": True, "max_new_tokens": 16, "top_k": 0, "temperature": 1.5}
    together = stream_ids(model, prompts(6), num_return_sequences=3, seed=10, **options)
    assert together.shape[0] == 3
    assert len({tuple(row.tolist()) for row in together}) == 3
    for row in range(3):
        alone = stream_ids(model, prompts(6), seed=10 + row, **options)
        assert alone[0].equal(together[row])


def test_sampling_respects_the_processors_and_torchs_seed() -> None:
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


def test_a_cache_that_is_passed_in_is_continued() -> None:
    model, inputs = tiny_llama(), prompts(9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :5], past_key_values=cache)
    expected = generated(model, inputs, do_sample=False, max_new_tokens=8)
    options = {"do_sample": False, "max_new_tokens": 8, "past_key_values": cache}
    assert stream_ids(model, inputs, **options).equal(expected)


def counting(model: PreTrainedModel) -> Callable[[], int]:
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return lambda: calls[0]


def test_each_id_leaves_before_the_next_one_is_computed() -> None:
    model = tiny_llama()
    forwards = counting(model)
    steps = model.generate(**prompts(5), custom_generate=stream_sample, max_new_tokens=4)
    assert forwards() == 0
    for n, _ in enumerate(steps, start=1):
        assert forwards() == n
    assert forwards() == 4


def test_inference_mode_holds_inside_the_generator_in_any_thread_and_only_there() -> None:
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
        thread.join()
        outside.append(torch.is_inference_mode_enabled())
    assert seen == [True] * 3
    assert outside == [False] * 3


def test_two_streams_interleaved_step_by_step_do_not_disturb_each_other() -> None:
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
def test_what_is_not_a_stream_of_ids_is_refused_at_once(options: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        tiny_llama().generate(
            **prompts(5), custom_generate=stream_sample, max_new_tokens=5, **options
        )
    assert named in (str(error.value), error.value.param) or named in str(error.value)


def test_an_encoder_decoder_model_is_refused() -> None:
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


# init_stream_support


@pytest.fixture
def stream_support() -> Iterator[Callable[[], None]]:
    undo = init_stream_support()
    yield undo
    undo()


def test_do_stream_gives_a_generator_of_id_tensors(stream_support: Callable[[], None]) -> None:
    """The usage lines of the transformers-stream-generator README."""
    model, tokenizer = tiny_llama(vocab_size=258), byte_tokenizer()
    input_ids = prompts(6)["input_ids"]
    with pytest.warns(UserWarning, match="max_length"):  # transformers' own advice
        generator = model.generate(input_ids, do_stream=True, do_sample=True)
    words = [tokenizer.decode(token) for token in generator]
    assert len(words) == 20, "transformers' default length"
    assert isinstance("".join(words), str)


def test_do_stream_equals_generate_and_calls_without_it_are_untouched(
    stream_support: Callable[[], None],
) -> None:
    model, inputs = tiny_llama(), prompts(6, 3)
    options = {"do_sample": False, "max_new_tokens": 12}
    plain = generated(model, inputs, **options)
    assert isinstance(plain, torch.Tensor)
    streamed = torch.stack(list(model.generate(**inputs, do_stream=True, **options)), dim=1)
    assert streamed.equal(plain)
    with_dict = model.generate(**inputs, return_dict_in_generate=True, num_beams=2, **options)
    assert with_dict.sequences.shape == (2, 18)


def test_it_can_be_undone_and_done_twice() -> None:
    original = GenerationMixin.generate
    undo = init_stream_support()
    assert init_stream_support() is undo
    assert GenerationMixin.generate is not original
    undo()
    assert GenerationMixin.generate is original
    undo()
    assert GenerationMixin.generate is original


def test_a_seed_makes_a_stream_repeatable(stream_support: Callable[[], None]) -> None:
    model = tiny_llama()

    def run(seed: int) -> list[int]:
        options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 20}
        options["do_stream"] = True
        return [int(t) for t in model.generate(**prompts(5), seed=seed, **options)]

    assert run(1) == run(1) != run(2)


def test_stop_strings_work_with_a_tokenizer(stream_support: Callable[[], None]) -> None:
    model, tokenizer = FakeModel(says("one two three")), byte_tokenizer()
    ids = torch.tensor([tokenizer.encode("assistant:")])
    options = {"do_stream": True, "max_new_tokens": 50, "stop_strings": ["two"]}
    for given in (options, {**options, "stop_strings": "two"}):
        steps = model.generate(ids, tokenizer=tokenizer, **given)
        assert tokenizer.decode([int(step) for step in steps]) == "one two"
    config = GenerationConfig(stop_strings=["two"], max_new_tokens=50, use_cache=False)
    steps = model.generate(ids, config, do_stream=True, tokenizer=tokenizer)
    assert tokenizer.decode([int(step) for step in steps]) == "one two"
    assert config.stop_strings == ["two"], "the caller's own config stays as it was"
    with pytest.raises(InvalidRequest, match="tokenizer"):
        model.generate(ids, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"assistant_model": object()}, "assistant_model"),
        ({"streamer": object()}, "streamer"),
        ({"custom_generate": lambda *a, **k: None}, "custom_generate"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ],
)
def test_do_stream_refuses_by_name_what_it_cannot_do(
    stream_support: Callable[[], None], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        tiny_llama().generate(**prompts(4), do_stream=True, max_new_tokens=5, **options)
    assert error.value.param == named
    with pytest.raises(InvalidRequest, match="beam_search"):
        tiny_llama().generate(**prompts(4), do_stream=True, max_new_tokens=5, num_beams=3)


# stream_generate


def test_stream_generate_yields_text_and_ends_with_the_reason() -> None:
    fake = fake_checkpoint(says("彩虹 🌈!"))
    outputs = list(stream_generate(fake.model, fake.tokenizer, [{"role": "user", "content": "?"}]))
    assert "".join(o.delta for o in outputs) == "彩虹 🌈!"
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_stream_generate_takes_ids_and_stops_at_the_length() -> None:
    fake = fake_checkpoint(says("abcdef"), context_length=20)
    ids = fake.tokenizer.encode("assistant:")
    outputs = list(stream_generate(fake.model, fake.tokenizer, ids, max_new_tokens=3))
    assert "".join(o.delta for o in outputs) == "abc"
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    outputs = list(stream_generate(fake.model, fake.tokenizer, [7] * 10 + ids[-10:-1]))
    assert outputs[-1].finish_reason is FinishReason.LENGTH, "the context ends the reply"
    assert len(outputs) == 1


def test_stop_strings_and_stop_ids_end_a_reply_and_are_not_shown() -> None:
    fake = fake_checkpoint(says("one two three"))
    messages = [{"role": "user", "content": "count"}]
    for params in ({"stop": "two"}, {"stop": ["xyz", "two t"]}, {"stop_token_ids": [ord("t")]}):
        outputs = list(stream_generate(fake.model, fake.tokenizer, messages, **params))
        assert "".join(o.delta for o in outputs) == "one "
        assert outputs[-1].finish_reason is FinishReason.STOP


def test_the_penalties_and_biases_reach_the_logits() -> None:
    """The fake model prefers one id by 50; a bias or a penalty of more than that is seen."""
    fake = fake_checkpoint(lambda ids: ord("a"))
    ids = fake.tokenizer.encode("x")

    def text(**params: Any) -> str:
        params = {"max_new_tokens": 4, "temperature": 0, **params}
        return "".join(o.delta for o in stream_generate(fake.model, fake.tokenizer, ids, **params))

    assert text() == "aaaa"
    assert text(logit_bias={str(ord("b")): 60}) == "bbbb"
    assert text(logit_bias={ord("a"): -60, ord("b"): 0.5, END: -100}) == "bbbb"
    assert text(no_repeat_ngram_size=2, logit_bias={ord("b"): 1}) == "aaba"
    # 25 times 2 is 50: the twenty-sixth "a" gives way.
    long = text(frequency_penalty=2.0, max_new_tokens=26, logit_bias={ord("b"): 0.5})
    assert long == "a" * 25 + "b"


def test_greedy_text_of_the_demo_model_is_transformers_own(demo: Any) -> None:
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


def test_lengths_of_the_checkpoints_generation_config_do_not_cut_a_reply() -> None:
    fake = fake_checkpoint(says("abcdefgh"))
    fake.model.generation_config.max_new_tokens = 4
    fake.model.generation_config.max_time = 0.0
    ids = fake.tokenizer.encode("assistant:")
    outputs = list(stream_generate(fake.model, fake.tokenizer, ids, max_new_tokens=6))
    assert "".join(o.delta for o in outputs) == "abcdef"
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_model_without_any_end_id_runs_to_the_length() -> None:
    model, tokenizer = tiny_llama(vocab_size=258), byte_tokenizer()
    tokenizer.eos_token = None
    outputs = list(stream_generate(model, tokenizer, [5, 6, 7], max_new_tokens=4))
    assert [output.finish_reason for output in outputs][-1] is FinishReason.LENGTH
    assert len(outputs) == 4


def test_what_cannot_be_served_is_refused_before_anything_is_computed() -> None:
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


def checkpoint_of_noise() -> Checkpoint:
    return Checkpoint.of(tiny_llama(), byte_tokenizer())


def test_replies_of_a_checkpoint_are_the_engines_however_they_are_read() -> None:
    checkpoint = checkpoint_of_noise()
    asked = [{"max_new_tokens": 9 + n, "temperature": 1.0, "seed": n} for n in range(6)]
    engine = Engine(checkpoint)
    streams = [engine.submit([5, 6, 7], SamplingParams(**fields)) for fields in asked]
    while engine.step():
        pass
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
    checkpoint = checkpoint_of_noise()
    list(stream_generate(checkpoint, [5, 6, 7], max_new_tokens=2))  # so that its engine is there
    forwards = counting(checkpoint.model)
    fields: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20}
    replies = [stream_generate(checkpoint, [5, 6, n], **fields) for n in range(8, 12)]
    for outputs in zip(*replies, strict=True):
        assert all(outputs)
    assert forwards() == 4 + 19 + 3, "the prompts, then steps for all; the last begins three later"

    before = forwards()
    with ThreadPoolExecutor(max_workers=4) as pool:
        replies = [stream_generate(checkpoint, [9, 6, n], **fields) for n in range(8, 12)]
        assert [len(outputs) for outputs in pool.map(list, replies)] == [20] * 4
    assert forwards() - before < 4 * 20


def test_more_replies_than_can_wait_are_all_given() -> None:
    checkpoint = checkpoint_of_noise()
    replies = [stream_generate(checkpoint, [5, 6, 7], max_new_tokens=9) for _ in range(60)]
    for reply in replies:
        next(reply)
    assert {len(list(reply)) for reply in replies} == {8}


def test_a_reply_that_is_there_does_not_wait_for_another_readers_step() -> None:
    gate = Gate(says("abcdef"))
    checkpoint = fake_checkpoint(gate)
    messages = [{"role": "user", "content": "?"}]
    gate.permits.release(5)
    one, other = (stream_generate(checkpoint, messages) for _ in range(2))
    assert [next(reply).delta for reply in (one, other, one, one)] == ["a", "a", "b", "c"]
    for _ in range(5):
        gate.arrived.acquire()
    with ThreadPoolExecutor(max_workers=1) as pool:
        fourth = pool.submit(next, one)
        assert gate.arrived.acquire(timeout=60), "a step that is not let go on"
        assert next(other).delta == "b"
        gate.permits.release(100)
        assert fourth.result().delta == "d"


def test_an_interrupted_step_spoils_no_other_reply() -> None:
    interrupts = [KeyboardInterrupt()]

    def next_id(ids: list[int]) -> int:
        if reply_of(ids) == 2 and is_complete_prompt(ids) and interrupts:
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


def test_a_reply_that_is_left_or_never_begun_is_not_computed_on() -> None:
    checkpoint = checkpoint_of_noise()
    left = stream_generate(checkpoint, [5, 6, 7], max_new_tokens=1000)
    next(left)
    left.close()
    stream_generate(checkpoint, [5, 6, 7])
    list(stream_generate(checkpoint, [8, 9], max_new_tokens=2))
    forwards = counting(checkpoint.model)
    list(stream_generate(checkpoint, [5, 6, 7], max_new_tokens=3))
    assert forwards() == 3
    assert _replies_of(checkpoint).engine.running == 0


def test_a_checkpoint_that_nobody_uses_is_let_go() -> None:
    checkpoint = checkpoint_of_noise()
    list(stream_generate(checkpoint, [5, 6, 7], max_new_tokens=3))
    gone = weakref.ref(checkpoint)
    del checkpoint
    gc.collect()
    assert gone() is None


def test_what_a_checkpoint_cannot_serve_is_refused_before_anything_is_computed() -> None:
    checkpoint = checkpoint_of_noise()
    with pytest.raises(PromptTooLong):
        stream_generate(checkpoint, [1] * 10_000)
    with pytest.raises(ValidationError):
        stream_generate(checkpoint, [1], temperature=-1)
    with pytest.raises(TypeError):
        stream_generate(checkpoint, [1], SamplingParams(), temperature=1)
    with pytest.raises(TypeError):
        stream_generate(checkpoint)  # type: ignore[call-overload]
    alone = Checkpoint.of(family("mamba"), byte_tokenizer())
    with pytest.raises(InvalidRequest, match="log-probabilities"):
        stream_generate(alone, [1], logprobs=1)


def test_packed_weights_run_on_their_graph(demo: Checkpoint) -> None:
    messages = [{"role": "user", "content": "Name a colour."}]
    fields: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "logprobs": 1}
    engine = Engine(demo)
    stream = engine.submit(demo.chat.encode(messages), SamplingParams(**fields))
    while engine.step():
        pass
    reply = list(stream_generate(demo, messages, **fields))
    assert reply == list(stream)
    choice = reply[0].choice
    assert choice is not None
    assert choice.logprob is not None, "which the dense model's loop does not give"


def test_an_end_id_that_the_vocabulary_lacks_does_not_break_a_least_length() -> None:
    checkpoint = checkpoint_of_noise()
    assert max(checkpoint.end_ids) >= checkpoint.vocab_size
    fields: dict[str, Any] = {"min_new_tokens": 3, "max_new_tokens": 5, "temperature": 0}
    assert len(list(stream_generate(checkpoint, [5, 6, 7], **fields))) == 5

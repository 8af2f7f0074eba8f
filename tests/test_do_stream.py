"""`init_stream_support` gives every model's `generate` a `do_stream` argument."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.fakes import (
    FakeModel,
    byte_tokenizer,
    says,
)
from support.models import generated, prompts, tiny_llama
from transformers import (
    GenerationConfig,
    GenerationMixin,
)

from stream_generator.errors import (
    InvalidRequest,
)
from stream_generator.generate import init_stream_support


@pytest.fixture
def stream_support() -> Iterator[Callable[[], None]]:
    undo = init_stream_support()
    yield undo
    undo()


def test_do_stream_gives_a_generator_of_id_tensors(stream_support: Callable[[], None]) -> None:
    """These lines are the usage example in transformers-stream-generator's README."""
    model, tokenizer = tiny_llama(vocab_size=258), byte_tokenizer()
    input_ids = prompts(6)["input_ids"]
    with pytest.warns(UserWarning, match="max_length"):  # transformers' own advice
        generator = model.generate(input_ids, do_stream=True, do_sample=True)
    words = [tokenizer.decode(token) for token in generator]
    assert len(words) == 20, "transformers' default length"
    assert all(isinstance(word, str) for word in words)


def test_do_stream_gives_the_ids_of_generate_and_plain_calls_stay_the_same(
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


def test_init_stream_support_can_be_called_twice_and_undone() -> None:
    original = GenerationMixin.generate
    undo = init_stream_support()
    assert init_stream_support() is undo
    assert GenerationMixin.generate is not original
    undo()
    assert GenerationMixin.generate is original
    undo()
    assert GenerationMixin.generate is original


def test_do_stream_repeats_its_ids_for_the_same_seed(stream_support: Callable[[], None]) -> None:
    model = tiny_llama()

    def run(seed: int) -> list[int]:
        options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 20}
        options["do_stream"] = True
        return [int(t) for t in model.generate(**prompts(5), seed=seed, **options)]

    assert run(1) == run(1) != run(2)


def test_do_stream_takes_stop_strings_with_a_tokenizer(stream_support: Callable[[], None]) -> None:
    model, tokenizer = FakeModel(says("one two three")), byte_tokenizer()
    ids = torch.tensor([tokenizer.encode("assistant:")])
    options = {"do_stream": True, "max_new_tokens": 50, "stop_strings": ["two"]}
    for given in (options, {**options, "stop_strings": "two"}):
        steps = model.generate(ids, tokenizer=tokenizer, **given)
        assert tokenizer.decode([int(step) for step in steps]) == "one two"
    config = GenerationConfig(stop_strings=["two"], max_new_tokens=50, use_cache=False)
    steps = model.generate(ids, config, do_stream=True, tokenizer=tokenizer)
    assert tokenizer.decode([int(step) for step in steps]) == "one two"
    assert config.stop_strings == ["two"], "the caller's config must not change"
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
def test_do_stream_rejects_an_unsupported_option_by_its_name(
    stream_support: Callable[[], None], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        tiny_llama().generate(**prompts(4), do_stream=True, max_new_tokens=5, **options)
    assert error.value.param == named
    with pytest.raises(InvalidRequest, match="beam_search"):
        tiny_llama().generate(**prompts(4), do_stream=True, max_new_tokens=5, num_beams=3)

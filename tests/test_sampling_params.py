"""`SamplingParams`: bounds, contradictions, and how defaults fill its gaps."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from stream_generator.sampling_params import SamplingParams

EMPTY = SamplingParams()


def resolved(defaults: SamplingParams = EMPTY, **given: Any) -> dict[str, Any]:
    params = SamplingParams(**given).resolved(defaults, room=5000, seed=77)
    return params.model_dump(exclude_none=True)


def test_the_projects_defaults_fill_all_missing_parameters() -> None:
    assert resolved() == {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "max_new_tokens": 1024,
        "seed": 77,
    }


def test_a_checkpoints_defaults_override_the_projects_and_a_request_overrides_both() -> None:
    defaults = SamplingParams(temperature=0.3, top_k=20, repetition_penalty=1.05)
    assert resolved(defaults, top_k=5) == {
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "max_new_tokens": 1024,
        "seed": 77,
    }


@pytest.mark.parametrize("given", [{"temperature": 0}, {"do_sample": False}])
def test_greedy_requests_have_no_sampling_parameters(given: dict[str, Any]) -> None:
    defaults = SamplingParams(temperature=0.3, top_k=20)
    assert resolved(defaults, **given) == {"do_sample": False, "max_new_tokens": 1024}


def test_a_request_may_sample_from_a_checkpoint_that_is_greedy_by_default() -> None:
    for greedy in (SamplingParams(do_sample=False), SamplingParams(temperature=0)):
        assert resolved(greedy)["do_sample"] is False
        assert resolved(greedy, temperature=1.0)["temperature"] == 1.0
        assert resolved(greedy, do_sample=True)["temperature"] == 0.6


def test_token_limits_are_lowered_to_the_room_in_the_context() -> None:
    params = SamplingParams(max_new_tokens=100, min_new_tokens=50).resolved(EMPTY, room=30, seed=0)
    assert (params.max_new_tokens, params.min_new_tokens) == (30, 30)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -0.1}, {"temperature": 5.1}, {"temperature": 0.001},
        {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "1"},
        {"temperature": True}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5},
        {"min_p": -0.1}, {"min_p": 1.1}, {"typical_p": 0}, {"repetition_penalty": 0},
        {"frequency_penalty": 2.1}, {"presence_penalty": -2.1}, {"no_repeat_ngram_size": -1},
        {"max_new_tokens": 0}, {"max_new_tokens": 10**7}, {"min_new_tokens": -1}, {"seed": -1},
        {"seed": 2**63}, {"stop": ""}, {"stop": [""]}, {"stop": ["a"] * 17}, {"stop": "a" * 257},
        {"stop": [1]}, {"stop_token_ids": [-1]}, {"stop_token_ids": ["1"]},
        {"logit_bias": {"a": 1}}, {"logit_bias": {"1": 101}}, {"logit_bias": {"-1": 1}},
        {"logit_bias": [1]}, {"unknown": 1}, {"do_sample": 1},
        {"do_sample": False, "temperature": 0.5}, {"do_sample": False, "top_p": 0.9},
        {"do_sample": False, "top_k": 3}, {"do_sample": True, "temperature": 0},
        {"min_new_tokens": 5, "max_new_tokens": 4},
    ],
)  # fmt: skip
def test_sampling_params_reject_bad_values_and_contradictions(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(**given)


def test_sampling_params_accept_openais_forms() -> None:
    params = SamplingParams(stop="END", logit_bias={"12": -100, "7": 1.5}, temperature=1)
    assert params.stop == ("END",)
    assert params.logit_bias == {12: -100, 7: 1.5}


def test_min_new_tokens_above_the_default_limit_raises_the_limit() -> None:
    assert resolved(min_new_tokens=3000)["max_new_tokens"] == 3000

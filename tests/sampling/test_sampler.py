"""Draws, sampling parameters, and the sampling of all rows of a step."""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import fake_checkpoint, says

from stream_generator.errors import GenerationFailed
from stream_generator.request import Request
from stream_generator.sampling.processors import (
    ADJUST,
    RESTRICT,
    CountPenalty,
    processors,
)
from stream_generator.sampling.sampler import check_scores, draw, generator_for, sample, uniform
from stream_generator.sampling_params import DRAW_FIELDS, SamplingParams

LARGEST_UNIFORM = 1 - 2**-53

scores_lists = st.lists(
    st.one_of(st.floats(-40, 40), st.just(-math.inf)), min_size=2, max_size=60
).filter(lambda row: any(math.isfinite(x) for x in row))
uniforms = st.one_of(st.floats(0, LARGEST_UNIFORM), st.sampled_from([0.0, LARGEST_UNIFORM]))


def draw_one(row: list[float], u: float) -> int:
    return int(draw(torch.tensor([row]), torch.tensor([u], dtype=torch.float64)))


@given(scores_lists, uniforms)
@settings(deadline=None, max_examples=500)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(row: list[float], u: float) -> None:
    probabilities = torch.softmax(torch.tensor(row), dim=-1).double()
    cumulative = probabilities.cumsum(0)
    target = u * float(cumulative[-1])
    index = draw_one(row, u)
    assert probabilities[index] > 0, "an id of probability 0 was drawn"
    below = float(cumulative[index - 1]) if index else 0.0
    assert below <= target + 1e-12
    assert target <= float(cumulative[index]) + 1e-12


def test_the_smallest_and_largest_numbers_draw_the_first_and_last_possible_ids() -> None:
    row = [-math.inf, 0.0, 1.0, -math.inf, 0.5, -math.inf]
    assert draw_one(row, 0.0) == 1
    assert draw_one(row, LARGEST_UNIFORM) == 4


def test_rows_are_drawn_independently() -> None:
    torch.manual_seed(0)
    scores = torch.randn(16, 300)
    numbers = torch.rand(16, dtype=torch.float64)
    together = draw(scores, numbers)
    alone = [int(draw(scores[i : i + 1], numbers[i : i + 1])) for i in range(16)]
    assert together.tolist() == alone


def test_drawn_frequencies_follow_the_probabilities() -> None:
    row = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]]))
    generator = generator_for(7)
    n = 20_000
    numbers = torch.tensor([uniform(generator) for _ in range(n)], dtype=torch.float64)
    counts = Counter(draw(row.expand(n, -1), numbers).tolist())
    for index, p in enumerate([0.5, 0.0, 0.3, 0.2]):
        # Four standard deviations of a binomial. The seed is fixed, so the test is deterministic.
        assert abs(counts[index] - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = generator_for(3), generator_for(3)
    assert [uniform(a) for _ in range(5)] == [uniform(b) for _ in range(5)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_rejected(bad: float) -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = bad
    with pytest.raises(GenerationFailed, match="NaN or infinite"):
        check_scores(scores)
    with pytest.raises(GenerationFailed):
        check_scores(torch.full((1, 5), -math.inf))
    check_scores(scores[:1])


@given(st.lists(st.integers(0, 9), max_size=30), st.floats(-2, 2), st.floats(-2, 2))
@settings(deadline=None)
def test_count_penalties_follow_openais_formula_and_ignore_the_prompt(
    generated: list[int], frequency: float, presence: float
) -> None:
    prompt = [9, 9, 9]
    request = CHECKPOINT.new_request(prompt, SamplingParams(), request_id="x")
    scores = torch.zeros(1, 10)
    ids = torch.tensor([prompt + generated])
    scores = CountPenalty(request, frequency=frequency)(ids, scores)
    out = CountPenalty(request, presence=presence)(ids, scores)
    for j in range(10):
        count = generated.count(j)
        assert float(out[0, j]) == pytest.approx(
            -count * frequency - (count > 0) * presence, abs=1e-4
        )


# Tables of sampling parameters


def test_every_parameter_that_changes_logits_has_a_processor() -> None:
    unrelated = {"max_new_tokens", "do_sample", "seed", "stop", "stop_token_ids", "logprobs"}
    assert {*ADJUST, *RESTRICT} == SamplingParams.model_fields.keys() - unrelated
    assert tuple(RESTRICT) == DRAW_FIELDS


@pytest.mark.parametrize("name", [*ADJUST, *RESTRICT])
def test_a_parameter_with_its_neutral_value_adds_no_processor(name: str) -> None:
    table = ADJUST if name in ADJUST else RESTRICT
    (request,) = requests_of({"do_sample": True, "seed": 1, name: table[name].neutral})
    assert not processors({name: table[name]}, request)


# Sampling of all rows of a step


CLOSE = 1e-4
CHECKPOINT = dataclasses.replace(fake_checkpoint(says("")), vocab_size=400)


def requests_of(*params: dict[str, Any]) -> list[Request]:
    return [
        CHECKPOINT.new_request([1, 2, 3, 2], SamplingParams(**p), request_id="x") for p in params
    ]


def sample_one_by_one(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    """Sample with transformers' processors and a draw over the whole vocabulary, row by row."""
    ids = []
    for row, request in enumerate(requests):
        scores = logits[row : row + 1].clone()
        scores = processors(ADJUST, request)(torch.tensor([request.all_ids]), scores)
        if request.params.greedy:
            ids.append(int(scores.argmax()))
            continue
        scores = processors(RESTRICT, request)(None, scores)
        number = uniform(generator_for(request.params.seed or 0))
        ids.append(int(draw(scores, torch.tensor([number], dtype=torch.float64))))
    return ids


def ids_of(sampled: list[Any]) -> list[int]:
    return [choice.token_id for choice in sampled]


filters = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32)},
    optional={
        "temperature": st.sampled_from([0, 0.3, 1.0, 1.7, 5.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 255, 256, 257, 399]),
        "top_p": st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "typical_p": st.sampled_from([0.2, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.2]),
        "no_repeat_ngram_size": st.just(2),
        "logit_bias": st.just({7: 5.0, 2: -3.0}),
        "frequency_penalty": st.just(0.5),
    },
)


@given(st.lists(filters, min_size=1, max_size=8), st.integers(0, 2**16), st.booleans())
@settings(deadline=None, max_examples=200)
def test_sampling_a_batch_gives_each_row_the_id_of_transformers_processors(
    params: list[dict[str, Any]], seed: int, ties: bool
) -> None:
    if ties:  # of equal scores, top-p keeps the one that a sort puts first
        params = [p if p.get("temperature") == 0 else p | {"top_p": 1.0} for p in params]
    requests = requests_of(*params)
    torch.manual_seed(seed)
    logits = torch.randn(len(params), 400) * 3
    if ties:
        logits = logits.round()  # so that many ids share a score, also at the limit of top-k
    expected = sample_one_by_one(logits, requests)
    together = ids_of(sample(logits.clone(), requests))
    for row, request in enumerate(requests):
        assert together[row] == expected[row] or is_tie(logits[row : row + 1], request), row


def is_tie(logits: torch.Tensor, request: Request) -> bool:
    """Whether the last bits of a sum may decide which id is drawn.

    They decide where top-p or the drawn number falls on a boundary between two ids. The last bits
    of a sum of many probabilities depend on the processor's instructions.
    """
    params = request.params
    if params.greedy:
        return False
    nearby = [
        params.model_copy(update={"top_p": min(1.0, params.top_p * (1 + sign * CLOSE))})
        for sign in (-1, 1)
        if params.top_p is not None
    ]
    numbers = uniform(generator_for(params.seed or 0)) + torch.tensor([-CLOSE, CLOSE]).double()
    scores = processors(ADJUST, request)(torch.tensor([request.all_ids]), logits.clone())
    variants = [CHECKPOINT.new_request([1], near, request_id="x") for near in (params, *nearby)]
    ids = {
        int(draw(processors(RESTRICT, variant)(None, scores), number))
        for variant in variants
        for number in numbers.clamp(0, 1)[:, None]
    }
    return len(ids) > 1


def test_top_p_counts_ids_that_top_k_keeps_beyond_the_prefilter() -> None:
    torch.manual_seed(0)
    flat = {"top_k": 257, "top_p": 0.01, "temperature": 5.0}
    others = [{"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}]
    for seed in range(100):
        requests = requests_of(*({**row, "seed": seed} for row in (flat, *others)))
        logits = torch.randn(4, 400) * 3
        expected = sample_one_by_one(logits, requests)
        assert ids_of(sample(logits.clone(), requests)) == expected


def test_a_row_with_nan_or_infinite_logits_fails_alone() -> None:
    settings_of_rows = [{"temperature": 0}, {"seed": 1}, {"top_k": 5, "seed": 1}, {"seed": 2}]
    requests = requests_of(*settings_of_rows)
    logits = torch.randn(4, 400)
    expected = sample_one_by_one(logits, requests)
    logits[1, 17], logits[2, 5] = math.nan, math.inf
    first, second, third, fourth = sample(logits, requests_of(*settings_of_rows))
    assert ids_of([first, fourth]) == [expected[0], expected[3]]
    assert isinstance(second, GenerationFailed)
    assert isinstance(third, GenerationFailed)


def test_end_ids_are_excluded_until_min_new_tokens_is_reached() -> None:
    (request,) = requests_of({"min_new_tokens": 2, "temperature": 0, "stop_token_ids": [9]})
    logits = torch.zeros(1, 400)
    logits[0, 9], logits[0, 8] = 5.0, 4.0
    assert ids_of(sample(logits.clone(), [request])) == [8]
    request.output_ids += [8, 8]
    assert ids_of(sample(logits.clone(), [request])) == [9]


@pytest.mark.parametrize("draw_from", [{"temperature": 0}, {"seed": 1, "top_p": 1.0, "top_k": 300}])
def test_log_probabilities_are_the_models_own_whatever_the_parameters(
    draw_from: dict[str, Any],
) -> None:
    extras = {"logit_bias": {5: 9.0}, "repetition_penalty": 1.5}
    settings_of_rows = [
        {**draw_from, **extras, "logprobs": 3},
        {**draw_from, **extras, "logprobs": 0},
        {**draw_from, **extras},
    ]
    logits = torch.randn(1, 400).expand(3, -1) * 2
    own = logits[0].log_softmax(dim=-1)
    three, zero, not_asked = sample(logits.clone(), requests_of(*settings_of_rows))
    assert three.token_id == zero.token_id == not_asked.token_id
    assert three.logprob == zero.logprob == pytest.approx(float(own[three.token_id]), abs=1e-5)
    best = own.topk(3)
    assert [i for i, _ in three.alternatives] == best.indices.tolist()
    assert [p for _, p in three.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert zero.alternatives == ()
    assert not_asked.logprob is None

"""The one draw of the project, and the count penalties."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_generator.errors import GenerationFailed
from stream_generator.sampler import CountPenalty, check_scores, draw, generator_for, uniform

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


def test_the_extreme_numbers_give_the_first_and_the_last_possible_id() -> None:
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


def test_frequencies_follow_the_probabilities() -> None:
    row = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]]))
    generator = generator_for(7)
    n = 20_000
    numbers = torch.tensor([uniform(generator) for _ in range(n)], dtype=torch.float64)
    counts = Counter(draw(row.expand(n, -1), numbers).tolist())
    for index, p in enumerate([0.5, 0.0, 0.3, 0.2]):
        # Four standard deviations of a binomial; the seed is fixed, so this never flickers.
        assert abs(counts[index] - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = generator_for(3), generator_for(3)
    assert [uniform(a) for _ in range(5)] == [uniform(b) for _ in range(5)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = bad
    with pytest.raises(GenerationFailed, match="NaN or infinite"):
        check_scores(scores)
    with pytest.raises(GenerationFailed):
        check_scores(torch.full((1, 5), -math.inf))
    check_scores(scores[:1])


@given(st.lists(st.integers(0, 9), max_size=30), st.floats(-2, 2), st.floats(-2, 2))
@settings(deadline=None)
def test_count_penalties_follow_openais_formula_on_generated_ids_only(
    generated: list[int], frequency: float, presence: float
) -> None:
    prompt = [9, 9, 9]
    scores = torch.zeros(1, 10)
    ids = torch.tensor([prompt + generated])
    out = CountPenalty(frequency, presence, len(prompt))(ids, scores)
    for j in range(10):
        count = generated.count(j)
        assert float(out[0, j]) == pytest.approx(-count * frequency - (count > 0) * presence)

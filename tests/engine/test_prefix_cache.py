"""The longest computed beginning of a prompt, and who gets which slot."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import fake_checkpoint, says

from stream_generator.engine.prefix_cache import PrefixCache, common_prefix
from stream_generator.request import Request
from stream_generator.sampling_params import SamplingParams

CHECKPOINT = fake_checkpoint(says(""), context_length=500)
ids = st.lists(st.integers(0, 2), max_size=40)


def running(cache: PrefixCache, prompt: list[int], *output: int) -> Request:
    """A request whose prompt, and all of whose output but the last id, is computed."""
    request = CHECKPOINT.new_request(prompt, SamplingParams(), request_id="x")
    placement = cache.place(request)
    assert placement is not None
    request.start(placement.slot, placement.length)
    request.output_ids += output
    request.num_computed_tokens = len(prompt) + max(len(output) - 1, 0)
    return request


def place(cache: PrefixCache, prompt: list[int]) -> Any:
    return cache.place(CHECKPOINT.new_request(prompt, SamplingParams(), request_id="y"))


@given(ids, ids, ids)
@settings(deadline=None)
def test_the_common_prefix_is_the_longest_one(a: list[int], b: list[int], c: list[int]) -> None:
    for x, y in ((a, b), (a + b, a + c)):
        n = common_prefix(x, y)
        assert x[:n] == y[:n]
        assert n == min(len(x), len(y)) or x[n] != y[n]


def test_the_next_turn_goes_on_in_the_slot_of_the_last_one() -> None:
    cache = PrefixCache(3)
    first = running(cache, [1, 2, 3], 4, 5)
    cache.release(first)
    other = running(cache, [9, 9])
    assert other.slot != first.slot, "a slot that is worth something is given away last"
    placement = place(cache, [1, 2, 3, 4, 6, 7])
    assert (placement.slot, placement.source, placement.length) == (first.slot, first.slot, 4)


def test_the_last_output_id_is_not_taken_for_computed() -> None:
    cache = PrefixCache(2)
    cache.release(running(cache, [1, 2], 3, 4))
    assert place(cache, [1, 2, 3, 4, 5]).length == 3


def test_at_least_the_last_prompt_id_is_left_to_compute() -> None:
    cache = PrefixCache(2)
    cache.release(running(cache, [1, 2, 3]))
    assert place(cache, [1, 2, 3]).length == 2
    assert place(PrefixCache(1), [1]).length == 0


def test_what_still_runs_is_copied_and_not_taken() -> None:
    cache = PrefixCache(2)
    first = running(cache, [1, 2, 3], 4)
    placement = place(cache, [1, 2, 3, 8])
    assert placement.source == first.slot
    assert placement.slot != first.slot
    assert placement.length == 3
    assert place(cache, [5]) is None, "no slot is left"


def test_a_part_of_what_a_slot_holds_is_copied_so_that_the_rest_is_not_lost() -> None:
    cache = PrefixCache(2)
    system = [1, 2, 3]
    first = running(cache, [*system, 4, 5])
    cache.release(first)
    placement = place(cache, [*system, 8, 9])
    assert (placement.source, placement.length) == (first.slot, 3)
    assert placement.slot != first.slot
    assert place(cache, [*system, 4, 5, 6]).length == 5


def test_the_least_recently_used_slot_is_given_away_first() -> None:
    cache = PrefixCache(3)
    requests = [running(cache, [n, n]) for n in (1, 2, 3)]
    for n in (1, 0, 2):
        cache.release(requests[n])
    assert [place(cache, [9]).slot for _ in range(3)] == [1, 0, 2]


def test_what_failed_or_was_cleared_is_not_found_again() -> None:
    cache = PrefixCache(2)
    cache.release(running(cache, [1, 2, 3]), keep=False)
    assert place(cache, [1, 2, 3, 4]).length == 0
    cache = PrefixCache(1)
    cache.release(running(cache, [1, 2, 3]))
    cache.clear()
    assert place(cache, [1, 2, 3, 4]).length == 0


def test_a_prompt_that_was_left_in_the_middle_is_worth_what_was_computed() -> None:
    cache = PrefixCache(1)
    request = running(cache, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 2
    cache.release(request)
    assert place(cache, [1, 2, 3, 4, 5]).length == 2


def test_what_a_neighbour_has_computed_since_is_found_when_the_prompt_begins() -> None:
    cache = PrefixCache(2)
    first = running(cache, [1, 2, 3, 4])
    first.num_computed_tokens = 0
    second = running(cache, [1, 2, 3, 5])
    second.num_computed_tokens = 0
    assert cache.longest(second)[1] == 0
    first.num_computed_tokens = 4
    assert cache.longest(second) == (first.slot, 3)

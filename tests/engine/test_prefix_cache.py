"""Slots for requests, and the longest computed prefix of a prompt."""

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
    """A request whose prompt is computed, and its output except for the last id."""
    request = CHECKPOINT.new_request(prompt, SamplingParams(), request_id="x")
    assigned = cache.assign(request)
    assert assigned is not None
    request.start(assigned.slot, assigned.length)
    request.output_ids += output
    request.num_computed_tokens = len(prompt) + max(len(output) - 1, 0)
    return request


def assign(cache: PrefixCache, prompt: list[int]) -> Any:
    return cache.assign(CHECKPOINT.new_request(prompt, SamplingParams(), request_id="y"))


@given(ids, ids, ids)
@settings(deadline=None)
def test_the_common_prefix_is_the_longest_one(a: list[int], b: list[int], c: list[int]) -> None:
    for x, y in ((a, b), (a + b, a + c)):
        n = common_prefix(x, y)
        assert x[:n] == y[:n]
        assert n == min(len(x), len(y)) or x[n] != y[n]


def test_the_next_turn_of_a_chat_continues_in_the_slot_of_the_last_turn() -> None:
    cache = PrefixCache(3)
    first = running(cache, [1, 2, 3], 4, 5)
    cache.release(first)
    other = running(cache, [9, 9])
    assert other.slot != first.slot, "a slot with a cached prefix is assigned last"
    assigned = assign(cache, [1, 2, 3, 4, 6, 7])
    assert (assigned.slot, assigned.source, assigned.length) == (first.slot, first.slot, 4)


def test_the_last_output_id_does_not_count_as_computed() -> None:
    cache = PrefixCache(2)
    cache.release(running(cache, [1, 2], 3, 4))
    assert assign(cache, [1, 2, 3, 4, 5]).length == 3


def test_at_least_the_last_prompt_id_is_left_to_compute() -> None:
    cache = PrefixCache(2)
    cache.release(running(cache, [1, 2, 3]))
    assert assign(cache, [1, 2, 3]).length == 2
    assert assign(PrefixCache(1), [1]).length == 0


def test_the_prefix_of_a_running_request_is_copied_to_another_slot() -> None:
    cache = PrefixCache(2)
    first = running(cache, [1, 2, 3], 4)
    assigned = assign(cache, [1, 2, 3, 8])
    assert assigned.source == first.slot
    assert assigned.slot != first.slot
    assert assigned.length == 3
    assert assign(cache, [5]) is None, "no slot is left"


def test_a_slot_that_shares_only_a_part_of_its_ids_is_copied_and_kept() -> None:
    cache = PrefixCache(2)
    system = [1, 2, 3]
    first = running(cache, [*system, 4, 5])
    cache.release(first)
    assigned = assign(cache, [*system, 8, 9])
    assert (assigned.source, assigned.length) == (first.slot, 3)
    assert assigned.slot != first.slot
    assert assign(cache, [*system, 4, 5, 6]).length == 5


def test_the_least_recently_used_slot_is_assigned_first() -> None:
    cache = PrefixCache(3)
    requests = [running(cache, [n, n]) for n in (1, 2, 3)]
    for n in (1, 0, 2):
        cache.release(requests[n])
    assert [assign(cache, [9]).slot for _ in range(3)] == [1, 0, 2]


def test_failed_and_cleared_prefixes_are_not_reused() -> None:
    cache = PrefixCache(2)
    cache.release(running(cache, [1, 2, 3]), keep=False)
    assert assign(cache, [1, 2, 3, 4]).length == 0
    cache = PrefixCache(1)
    cache.release(running(cache, [1, 2, 3]))
    cache.clear()
    assert assign(cache, [1, 2, 3, 4]).length == 0


def test_the_computed_part_of_an_aborted_prompt_is_reused() -> None:
    cache = PrefixCache(1)
    request = running(cache, [1, 2, 3, 4, 5])
    request.num_computed_tokens = 2
    cache.release(request)
    assert assign(cache, [1, 2, 3, 4, 5]).length == 2


def test_a_prefix_computed_after_a_request_was_admitted_is_found() -> None:
    cache = PrefixCache(2)
    first = running(cache, [1, 2, 3, 4])
    first.num_computed_tokens = 0
    second = running(cache, [1, 2, 3, 5])
    second.num_computed_tokens = 0
    assert cache.longest(second)[1] == 0
    first.num_computed_tokens = 4
    assert cache.longest(second) == (first.slot, 3)

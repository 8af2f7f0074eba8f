"""The scheduler's laws, with no model: nothing lost or served twice, order and budget kept."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.fakes import fake_checkpoint, says

from stream_generator.engine.scheduler import (
    FIRST_CHUNK,
    LARGEST_CHUNK,
    SMALLEST_CHUNK,
    Pace,
    Scheduler,
)
from stream_generator.request import Request
from stream_generator.sampling_params import SamplingParams

CHECKPOINT = fake_checkpoint(says(""), context_length=5000)


def new_request(name: str, prompt: int) -> Request:
    return CHECKPOINT.new_request([1] * prompt, SamplingParams(), request_id=name)


class Requests(RuleBasedStateMachine):
    """Submissions, aborts, faults and steps, in any order, against a runner that only counts."""

    @initialize(slots=st.integers(1, 5))
    def begin(self, slots: int) -> None:
        self.scheduler = Scheduler()
        self.free = slots
        self.submitted: list[Request] = []
        self.admitted: list[Request] = []
        self.gone: set[str] = set()
        self.num_computed_tokens: Counter[str] = Counter()
        self.last_left_out = False  # whether the last step did nothing for the oldest prompt

    @rule(prompt=st.integers(1, 1500))
    def submit(self, prompt: int) -> None:
        request = new_request(str(len(self.submitted)), prompt)
        self.submitted.append(request)
        self.scheduler.add(request)

    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        """Someone finishes, fails or goes away: waiting, in a prompt, or decoding."""
        present = [s for s in self.submitted if s.id not in self.gone]
        if present:
            request = data.draw(st.sampled_from(present))
            self.free += request in self.scheduler.running
            self.scheduler.remove(request)
            self.gone.add(request.id)

    def place(self, request: Request) -> bool:
        if self.free:
            self.free -= 1
            request.start(slot=0, cached=0)
            return True
        return False

    @rule(decode_ms=st.integers(1, 200), prompt_token_us=st.integers(10, 10_000))
    def step(self, decode_ms: int, prompt_token_us: int) -> None:
        self.admitted += self.scheduler.admit(self.place)
        plan = self.scheduler.plan()
        prompts = [chunk.request for chunk in plan.prefill]
        everyone = [*plan.decode, *prompts]
        assert len({s.id for s in everyone}) == len(everyone), "served twice in a step"
        assert all(not s.num_uncomputed_tokens for s in plan.decode)
        decoding = [s for s in self.scheduler.running if not s.num_uncomputed_tokens]
        assert plan.decode == decoding, "whoever has a prompt computed decodes in every step"
        unfinished = [s for s in self.scheduler.running if s.num_uncomputed_tokens]
        assert bool(prompts) == bool(unfinished), "a prompt goes on in every step"
        if prompts:
            oldest, nearest = unfinished[0], min(unfinished, key=lambda s: s.num_uncomputed_tokens)
            assert prompts[0] in (oldest, nearest)
            assert prompts[0] is oldest or not self.last_left_out, "the oldest in every other step"
            self.last_left_out = oldest not in prompts
            assert sum(chunk.length for chunk in plan.prefill) <= LARGEST_CHUNK
        for chunk in plan.prefill:
            left = chunk.request.num_uncomputed_tokens
            assert min(left, SMALLEST_CHUNK) <= chunk.length <= left
            chunk.request.num_computed_tokens += chunk.length
            self.scheduler.pace.record_prefill(prompt_token_us * 1e-6 * chunk.length, chunk.length)
        if plan.decode:
            self.scheduler.pace.record_decode(decode_ms * 1e-3)
        for request in plan.decode:
            request.num_computed_tokens += 1
            self.num_computed_tokens[request.id] += 1

    @invariant()
    def nothing_is_lost(self) -> None:
        present = {s.id for s in [*self.scheduler.waiting, *self.scheduler.running]}
        assert present == {s.id for s in self.submitted} - self.gone
        assert len(present) == len(self.scheduler.waiting) + len(self.scheduler.running)

    @invariant()
    def the_order_is_kept(self) -> None:
        assert [int(s.id) for s in self.admitted] == sorted(int(s.id) for s in self.admitted)
        assert list(self.scheduler.waiting) == [
            s for s in self.submitted if s.id not in self.gone and s not in self.admitted
        ]


TestRequests = Requests.TestCase
TestRequests.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)


def slow_scheduler() -> Scheduler:
    """One whose steps hold the smallest chunk beside those who decode."""
    scheduler = Scheduler()
    scheduler.pace.record_prefill(1.0, tokens=1)
    scheduler.pace.record_decode(0.01)
    return scheduler


def run_steps(scheduler: Scheduler, until: Request) -> int:
    """How many steps it takes until a prompt is computed."""
    for count in range(1, 1000):
        for chunk in scheduler.plan().prefill:
            chunk.request.num_computed_tokens += chunk.length
        if not until.num_uncomputed_tokens:
            return count
    raise AssertionError("it is never computed")


def started(scheduler: Scheduler, name: str, prompt: int, computed: int = 0) -> Request:
    request = new_request(name, prompt)
    scheduler.add(request)
    scheduler.admit(lambda s: s.start(0, computed) is None)
    return request


def test_a_short_prompt_does_not_wait_for_an_earlier_long_one() -> None:
    scheduler = slow_scheduler()
    started(scheduler, "decodes", 1, computed=1)
    started(scheduler, "long", 4000)
    short = started(scheduler, "short", 64)
    assert run_steps(scheduler, short) <= 2 * 64 // SMALLEST_CHUNK


def test_a_long_prompt_does_not_wait_for_many_short_ones() -> None:
    scheduler = slow_scheduler()
    started(scheduler, "decodes", 1, computed=1)
    long = started(scheduler, "long", 1600)
    for n in range(1000):
        started(scheduler, str(n), 64)
    assert run_steps(scheduler, long) <= 2 * 1600 // SMALLEST_CHUNK + 1


def test_the_rest_of_a_steps_budget_goes_to_the_next_prompt() -> None:
    scheduler = Scheduler()
    requests = [started(scheduler, str(n), 70) for n in range(3)]
    assert [(c.request, c.length) for c in scheduler.plan().prefill] == [(r, 70) for r in requests]


def test_a_prompt_is_computed_in_the_largest_chunks_while_no_request_decodes() -> None:
    assert Pace().budget(others_decode=False) == LARGEST_CHUNK


def test_the_first_chunk_beside_requests_in_decode_is_small() -> None:
    assert Pace().budget(others_decode=True) == FIRST_CHUNK


@pytest.mark.parametrize(
    ("decode", "per_token", "chunk"),
    [(0.05, 0.001, 50), (0.05, 0.02, SMALLEST_CHUNK), (1.0, 0.0001, LARGEST_CHUNK)],
)
def test_a_chunk_takes_about_as_long_as_the_decode_beside_it(
    decode: float, per_token: float, chunk: int
) -> None:
    pace = Pace()
    for _ in range(50):
        pace.record_decode(decode)
        pace.record_prefill(per_token * 100, 100)
    assert abs(pace.budget(others_decode=True) - chunk) <= 1

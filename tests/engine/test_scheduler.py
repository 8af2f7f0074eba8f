"""The scheduler loses no request, serves none twice, and keeps order and budget."""

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


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, remove and step requests in any order. No model runs; the test counts tokens."""

    @initialize(slots=st.integers(1, 5))
    def begin(self, slots: int) -> None:
        self.scheduler = Scheduler()
        self.free = slots
        self.submitted: list[Request] = []
        self.admitted: list[Request] = []
        self.removed: set[str] = set()
        self.num_computed_tokens: Counter[str] = Counter()
        self.skipped_oldest = False

    @rule(prompt=st.integers(1, 1500))
    def submit(self, prompt: int) -> None:
        request = new_request(str(len(self.submitted)), prompt)
        self.submitted.append(request)
        self.scheduler.add(request)

    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        """A waiting or running request finishes, fails or is aborted."""
        present = [s for s in self.submitted if s.id not in self.removed]
        if present:
            request = data.draw(st.sampled_from(present))
            self.free += request in self.scheduler.running
            self.scheduler.remove(request)
            self.removed.add(request.id)

    def assign(self, request: Request) -> bool:
        if self.free:
            self.free -= 1
            request.start(slot=0, cached=0)
            return True
        return False

    @rule(decode_ms=st.integers(1, 200), prompt_token_us=st.integers(10, 10_000))
    def step(self, decode_ms: int, prompt_token_us: int) -> None:
        self.admitted += self.scheduler.admit(self.assign)
        plan = self.scheduler.plan()
        prompts = [chunk.request for chunk in plan.prefill]
        planned = [*plan.decode, *prompts]
        assert len({s.id for s in planned}) == len(planned), "a step serves a request once"
        assert all(not s.num_uncomputed_tokens for s in plan.decode)
        decoding = [s for s in self.scheduler.running if not s.num_uncomputed_tokens]
        assert plan.decode == decoding, "every computed prompt decodes in every step"
        unfinished = [s for s in self.scheduler.running if s.num_uncomputed_tokens]
        assert bool(prompts) == bool(unfinished), "some prompt advances in every step"
        if prompts:
            oldest, nearest = unfinished[0], min(unfinished, key=lambda s: s.num_uncomputed_tokens)
            assert prompts[0] in (oldest, nearest)
            assert prompts[0] is oldest or not self.skipped_oldest, "oldest in every second step"
            self.skipped_oldest = oldest not in prompts
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
    def no_request_is_lost(self) -> None:
        present = {s.id for s in [*self.scheduler.waiting, *self.scheduler.running]}
        assert present == {s.id for s in self.submitted} - self.removed
        assert len(present) == len(self.scheduler.waiting) + len(self.scheduler.running)

    @invariant()
    def requests_are_admitted_in_order(self) -> None:
        assert [int(s.id) for s in self.admitted] == sorted(int(s.id) for s in self.admitted)
        assert list(self.scheduler.waiting) == [
            s for s in self.submitted if s.id not in self.removed and s not in self.admitted
        ]


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)


def slow_scheduler() -> Scheduler:
    """A scheduler that plans the smallest chunk beside requests in decode."""
    scheduler = Scheduler()
    scheduler.pace.record_prefill(1.0, tokens=1)
    scheduler.pace.record_decode(0.01)
    return scheduler


def run_steps(scheduler: Scheduler, until: Request) -> int:
    """Count the steps until a prompt is computed."""
    for count in range(1, 1000):
        for chunk in scheduler.plan().prefill:
            chunk.request.num_computed_tokens += chunk.length
        if not until.num_uncomputed_tokens:
            return count
    raise AssertionError("the prompt is never computed")


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

"""Engines that a test steps itself, and engines on their own threads."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.engines import engine_of
from support.fakes import fake_checkpoint, says

from stream_generator.engine.engine import Engine


@pytest.fixture
def engine() -> Engine:
    """An engine with one slot, which the test steps itself."""
    return engine_of(fake_checkpoint(says("abc")), slots=1, max_waiting=3)


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Engines on their own threads, closed after the test."""
    engines: list[Engine] = []

    def start_one(next_id: Any, **options: Any) -> Engine:
        engines.append(engine_of(fake_checkpoint(next_id), **{"slots": 4, **options}).start())
        return engines[-1]

    yield start_one
    for one in engines:
        one.close()

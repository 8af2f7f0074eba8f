"""Engines for tests, and helpers that read their streams."""

from typing import Any

from stream_generator.engine.engine import Engine
from stream_generator.engine.runners import runner_of
from stream_generator.engine.solo_runner import SoloRunner
from stream_generator.engine.token_stream import TokenStream
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import QueuePosition
from stream_generator.sampling_params import SamplingParams

PROMPT = list(b"assistant:")


def engine_of(checkpoint: Checkpoint, *, slots: int | None = None, **options: Any) -> Engine:
    """An engine with this number of slots. No thread runs it yet."""
    runner = runner_of(checkpoint, max_concurrent=slots)
    assert not isinstance(runner, SoloRunner), "the fake model fits the slot cache"
    return Engine(checkpoint, runner=runner, **options)


def submit(engine: Engine, request_id: str | None = None, **params: Any) -> TokenStream:
    return engine.submit(PROMPT, SamplingParams(**params), request_id)


def finish(engine: Engine) -> None:
    """Step the engine until no work is left."""
    while engine.step():
        pass


def drain(stream: TokenStream) -> list[Any]:
    """Take and return the outputs that a stream holds now."""
    outputs = []
    while (output := stream.get(timeout=0)) is not None:
        outputs.append(output)
    return outputs


def text(stream: TokenStream) -> str:
    """Read a stream to its end; return its text."""
    return "".join(output.delta for output in stream)


def free_slots(engine: Engine) -> int:
    """Count the free slots of an idle engine. A request that gets a slot has no queue position."""
    streams = engine.submit_several([PROMPT], SamplingParams(), engine.intake.running + 1)
    for stream in streams:
        stream.close()
    return sum(not isinstance(stream.get(timeout=0), QueuePosition) for stream in streams)

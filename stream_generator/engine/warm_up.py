"""Measure the speed of one stream, with a short reply before the first request arrives."""

import logging
import statistics
import time
from dataclasses import replace

from stream_generator.engine.runner import Runner
from stream_generator.errors import GenerationFailed
from stream_generator.loaded_model import Checkpoint
from stream_generator.request import Choice
from stream_generator.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

SECONDS = 0.5
PROMPT_TOKENS = 16
REPLY_TOKENS = 1000


def tokens_per_second(
    checkpoint: Checkpoint, runner: Runner, seconds: float = SECONDS
) -> float | None:
    """Measure the tokens per second of one stream. Return None if the measurement fails.

    The speed is the inverse of the median gap between two tokens. The measurement ends after
    `seconds`, but not before the second token. Call this function on the computing thread, before
    any request runs. The reply is sampled with default parameters, and none of it is kept.
    """
    try:
        gaps = _gaps(checkpoint, runner, seconds)
    except Exception as error:  # start anyway; requests report their own errors
        logger.warning("the speed could not be measured: %s", error)
        return None
    return 1 / statistics.median(gaps) if gaps else None


def _gaps(checkpoint: Checkpoint, runner: Runner, seconds: float) -> list[float]:
    """Measure the seconds between the tokens of one reply."""
    checkpoint = replace(checkpoint, context_length=runner.context_length)
    length = min(PROMPT_TOKENS, runner.context_length // 2)
    prompt = [n % checkpoint.vocab_size for n in range(length)]
    # With a minimum length, the reply cannot end before a gap is measured.
    params = SamplingParams(seed=0, min_new_tokens=REPLY_TOKENS, max_new_tokens=REPLY_TOKENS)
    request = checkpoint.new_request(prompt, params, request_id="warm-up")
    request.start(slot=0, cached=0)
    gaps: list[float] = []
    began = time.perf_counter()
    try:
        sampled = runner.prefill(request, length)
        last = time.perf_counter()
        while isinstance(sampled, Choice) and request.append(sampled).finish_reason is None:
            if gaps and time.perf_counter() - began >= seconds:
                break
            (sampled,) = runner.decode([request])
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]
    finally:
        runner.release(request, sound=True)
    if isinstance(sampled, GenerationFailed):
        raise sampled
    return gaps

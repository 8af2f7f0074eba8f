"""How fast is one stream here? A short reply, computed before the first request comes."""

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
MOST_TOKENS = 1000


def tokens_per_second(
    checkpoint: Checkpoint, runner: Runner, seconds: float = SECONDS
) -> float | None:
    """Measure one stream, from the median gap between its tokens; None where none could be made.

    seconds: when the measurement ends; a slow model computes one more token than its first.
    Call it on the thread that will compute, before any request runs. The reply is drawn like that
    of a request without parameters, and nothing of it is kept.
    """
    try:
        gaps = _gaps(checkpoint, runner, seconds)
    except Exception as error:  # requests that fail will say why
        logger.warning("the speed could not be measured: %s", error)
        return None
    return 1 / statistics.median(gaps) if gaps else None


def _gaps(checkpoint: Checkpoint, runner: Runner, seconds: float) -> list[float]:
    """Seconds between the tokens of one reply."""
    here = replace(checkpoint, context_length=runner.context_length)
    length = min(PROMPT_TOKENS, runner.context_length // 2)
    prompt = [n % checkpoint.vocab_size for n in range(length)]
    # The least length: a reply that ends by itself might be over before anything is measured.
    params = SamplingParams(seed=0, min_new_tokens=MOST_TOKENS, max_new_tokens=MOST_TOKENS)
    request = here.new_request(prompt, params, request_id="warm-up")
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

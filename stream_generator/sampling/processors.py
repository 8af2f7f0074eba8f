"""What each sampling parameter does to the logits, in two tables: `ADJUST` and `RESTRICT`.

To add a parameter, add a field to `SamplingParams` and a row here.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from stream_generator.request import Request
from stream_generator.sampling_params import SamplingParams


class CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's frequency and presence penalties, on generated tokens only.

    logit[j] -= count[j] * frequency + (count[j] > 0) * presence
    Source: OpenAI API reference, "Frequency and presence penalties".
    """

    def __init__(self, request: Request, *, frequency: float = 0.0, presence: float = 0.0):
        self.frequency = frequency
        self.presence = presence
        self.prompt_length = len(request.prompt_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - counts * self.frequency - (counts > 0) * self.presence


class ForbidIds(LogitsProcessor):  # type: ignore[misc]
    """Forbids some ids.

    In transformers, the processor for a minimum length compares the whole vocabulary with the end
    ids in each step. This one does not.
    """

    def __init__(self, ids: list[int]):
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # A configuration may name an end id that is not in the vocabulary.
        scores[:, [i for i in self.ids if i < scores.shape[1]]] = -math.inf
        return scores


class Parameter(NamedTuple):
    """One sampling parameter.

    neutral: the value that changes nothing. processor: a function that makes the logits processor
    if the value is not neutral. It returns None if the request needs none in this step.
    """

    neutral: Any
    processor: Callable[[Any, Request], LogitsProcessor | None]

    def value(self, name: str, params: SamplingParams) -> Any:
        """The parameter's value in `params`, or the neutral one if it is not set."""
        return getattr(params, name) or self.neutral


def _bias(biases: dict[int, float], _: Request) -> LogitsProcessor:
    return SequenceBiasLogitsProcessor([[[i], float(bias)] for i, bias in biases.items()])


def _minimum_length(length: int, request: Request) -> LogitsProcessor | None:
    if len(request.output_ids) >= length or not request.all_end_ids:
        return None
    return ForbidIds(sorted(request.all_end_ids))


# Parameters that adjust the scores of greedy and sampled rows, in transformers' order.
ADJUST: Mapping[str, Parameter] = {
    "logit_bias": Parameter({}, _bias),
    "repetition_penalty": Parameter(1.0, lambda v, _: RepetitionPenaltyLogitsProcessor(v)),
    "no_repeat_ngram_size": Parameter(0, lambda v, _: NoRepeatNGramLogitsProcessor(v)),
    "min_new_tokens": Parameter(0, _minimum_length),
    "frequency_penalty": Parameter(0.0, lambda v, r: CountPenalty(r, frequency=v)),
    "presence_penalty": Parameter(0.0, lambda v, r: CountPenalty(r, presence=v)),
}
# Parameters that restrict a draw, in transformers' order. Greedy rows ignore them.
RESTRICT: Mapping[str, Parameter] = {
    "temperature": Parameter(1.0, lambda v, _: TemperatureLogitsWarper(v)),
    "top_k": Parameter(0, lambda v, _: TopKLogitsWarper(v)),
    "top_p": Parameter(1.0, lambda v, _: TopPLogitsWarper(v)),
    "min_p": Parameter(0.0, lambda v, _: MinPLogitsWarper(v)),
    "typical_p": Parameter(1.0, lambda v, _: TypicalLogitsWarper(v)),
}

# Parameters for which transformers has no processors: its `generate` gets ours.
NOT_IN_TRANSFORMERS = {name: ADJUST[name] for name in ("frequency_penalty", "presence_penalty")}


def processors(table: Mapping[str, Parameter], request: Request) -> LogitsProcessorList:
    """The processors of `table` that a request needs in this step; often none."""
    needed = [
        parameter.processor(value, request)
        for name, parameter in table.items()
        if (value := parameter.value(name, request.params)) != parameter.neutral
    ]
    return LogitsProcessorList(processor for processor in needed if processor is not None)

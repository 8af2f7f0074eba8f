"""From scores to ids: the one draw of the project, and the penalties transformers lacks."""

import torch
from transformers import LogitsProcessor

from stream_generator.errors import GenerationFailed


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one id per row: the inverse of the cumulative distribution, at one uniform number.

    scores: float [rows, vocab], processed logits; -inf marks what must not be drawn.
    uniforms: float64 [rows] in [0, 1).
    Returns ids: int64 [rows].

    The distribution is cumulated in the order of the vocabulary. (In order of falling
    probability two nearly equal neighbours could change places from run to run, and the drawn
    id with them; so only a number at a boundary can.) The same seed gives the same ids on every
    device and beside any neighbours, up to the last bits of the scores.
    Source: inverse transform sampling, Devroye, Non-Uniform Random Variate Generation, II.2.
    """
    probabilities = torch.softmax(scores.float(), dim=-1)
    cumulative = probabilities.to(_widest_float(scores.device)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = uniforms.to(cumulative)[:, None] * total
    # Rounding may lift the target to the total itself, which lies past the last possible id.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # The first entry above the target: an id of probability 0 adds nothing, so it is never first.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def uniform(generator: torch.Generator) -> float:
    """One number in [0, 1) with 53 random bits, from a CPU generator."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def generator_for(seed: int) -> torch.Generator:
    """A sequence's own generator. On the CPU, so that a seed means the same on every device."""
    return torch.Generator().manual_seed(seed)


def check_scores(scores: torch.Tensor) -> None:
    """Raise `GenerationFailed` where a row offers nothing to choose: NaN, infinite or all -inf.

    scores: float [rows, vocab]. Costs one reduction and one transfer.
    """
    if not torch.isfinite(scores.amax(dim=-1)).all():
        raise GenerationFailed(
            "the model returned NaN or infinite logits, or the sampling parameters forbid every "
            "token; with a half-precision model, try another dtype"
        )


class CountPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's frequency and presence penalties, on generated tokens only.

    logit[j] -= count[j] * frequency + (count[j] > 0) * presence
    Source: OpenAI API reference, "Frequency and presence penalties".
    """

    def __init__(self, frequency: float, presence: float, prompt_length: int):
        self.frequency = frequency
        self.presence = presence
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - counts * self.frequency - (counts > 0) * self.presence


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64

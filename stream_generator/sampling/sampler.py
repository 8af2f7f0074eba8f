"""Scores to ids, for all rows of a step at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stream_generator.errors import GenerationFailed
from stream_generator.request import Choice, Request
from stream_generator.sampling.processors import ADJUST, RESTRICT, processors
from stream_generator.sampling_params import SamplingParams

# The number of highest scores that filters look at. In vocabularies of 50,000 to 130,000 ids they
# nearly always include all that top-p keeps. Finding them takes a tenth of the time of a full sort.
PREFILTER = 256

NOT_FINITE = (
    "the model returned NaN or infinite logits, or the sampling parameters forbid every token; "
    "change the parameters, or try another dtype if the model runs in half precision"
)

Sampled = Choice | GenerationFailed


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one id per row: invert its cumulative distribution at one uniform number.

    scores: float [rows, vocab], processed logits; an id with -inf is never drawn.
    uniforms: float64 [rows] in [0, 1).
    Returns ids: int64 [rows].

    Probabilities are summed in the order of the vocabulary. If they were sorted, two ids of nearly
    equal probability could change places from run to run, and change the drawn id. The same seed
    therefore gives the same ids on every device, whatever other requests run. An exception is a
    uniform number so near a boundary that the last bits of the scores decide. Source: inverse
    transform sampling, Devroye, Non-Uniform Random Variate Generation, II.2.
    """
    probabilities = torch.softmax(scores.float(), dim=-1)
    cumulative = probabilities.to(_widest_float(scores.device)).cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = uniforms.to(cumulative)[:, None] * total
    # Rounding may raise the target to the total, where the search would find no id.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    # The first entry above the target: an id of probability 0 adds nothing, so it is never first.
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return ids.clamp_max(scores.shape[1] - 1)  # only NaN exceeds this; callers check for NaN


def uniform(generator: torch.Generator) -> float:
    """Draw a number in [0, 1) with 53 random bits from a CPU generator."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def generator_for(seed: int) -> torch.Generator:
    """A generator on the CPU, so that a seed means the same on every device."""
    return torch.Generator().manual_seed(seed)


def check_scores(scores: torch.Tensor) -> None:
    """Raise `GenerationFailed` if no id can be chosen for a row: NaN, +inf, or nothing but -inf.

    scores: float [rows, vocab]. Takes one reduction and one transfer.
    """
    if not torch.isfinite(scores.amax(dim=-1)).all():
        raise GenerationFailed(NOT_FINITE)


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Sequence[Request]) -> list[Sampled]:
    """Choose one id per row by its request's parameters. If no id can be chosen for a row, the row
    gets an error.

    logits: float32 [rows, vocab], changed in place. One maximum serves all greedy rows, one draw
    serves all rows without filters, and one prefilter serves all rows with filters. The results
    come to the host in one transfer. A row needs a second transfer only if its filters may keep ids
    that are not among its `PREFILTER` highest.
    """
    most_alternatives = max(map(_num_alternatives, requests), default=-1)
    # Of the model's own distribution, before any processor.
    log_probs = logits.log_softmax(dim=-1) if most_alternatives >= 0 else None
    for row, request in enumerate(requests):
        if adjust := processors(ADJUST, request):
            ids = torch.tensor([request.all_ids], device=logits.device)
            logits[row : row + 1] = adjust(ids, logits[row : row + 1])
    finite = torch.isfinite(logits.amax(dim=-1))
    drawn = [row for row, s in enumerate(requests) if not s.params.greedy]
    all_drawn = len(drawn) == len(requests)
    uniforms = torch.zeros(len(requests), dtype=torch.float64, pin_memory=logits.is_cuda)
    if drawn:
        uniforms[drawn] = torch.tensor(
            [_next_uniform(requests[row]) for row in drawn], dtype=torch.float64
        )
        # From pinned memory, the copy does not wait for the model's step, so all that follows is
        # started while the GPU still computes the logits.
        uniforms = uniforms.to(logits.device, non_blocking=True)
        filters = _filters(
            tuple(_restrictions(requests[row].params) for row in drawn), logits.device
        )
    if all_drawn:
        chosen, certain = _draw_filtered(logits / filters.temperatures, filters, uniforms)
    else:
        chosen = logits.argmax(dim=-1)
        certain = torch.ones_like(finite)
        if drawn:
            scores = logits[drawn] / filters.temperatures
            chosen[drawn], certain[drawn] = _draw_filtered(scores, filters, uniforms[drawn])
    packed = [chosen[:, None], finite[:, None], certain[:, None]]
    if log_probs is not None:
        packed += [log_probs.gather(1, chosen[:, None]), *log_probs.topk(most_alternatives)]
    # Ids and flags are exact in float64, so one tensor can hold all results.
    results = torch.cat([part.double() for part in packed], dim=1).tolist()
    sampled: list[Sampled] = []
    for row, (token_id, is_finite, is_certain, *row_log_probs) in enumerate(results):
        if not is_finite:
            sampled.append(GenerationFailed(NOT_FINITE))
            continue
        if not is_certain:
            scores = processors(RESTRICT, requests[row])(None, logits[row : row + 1])
            token_id = int(draw(scores, uniforms[row : row + 1]))
            if log_probs is not None:
                row_log_probs[0] = float(log_probs[row, token_id])
        sampled.append(_choice(int(token_id), row_log_probs, _num_alternatives(requests[row])))
    return sampled


def _next_uniform(request: Request) -> float:
    """The uniform number of a request's next draw. It stays the same if a step is tried again."""
    if request.uniform is None:
        request.uniform = uniform(request.generator)
    return request.uniform


def _num_alternatives(request: Request) -> int:
    """How many alternatives a request wants with each id; -1: no log-probabilities at all."""
    return -1 if request.params.logprobs is None else request.params.logprobs


def _choice(token_id: int, log_probs: list[float], num_alternatives: int) -> Choice:
    """log_probs: the id's own, then the highest ones, then the ids of the highest ones."""
    if num_alternatives < 0:
        return Choice(token_id)
    own, count = log_probs[0], len(log_probs) // 2
    best = zip(log_probs[1 + count :], log_probs[1 : 1 + count], strict=True)
    return Choice(token_id, own, tuple((int(i), p) for i, p in best)[:num_alternatives])


def _restrictions(params: SamplingParams) -> tuple[float, ...]:
    """The values of `RESTRICT`, in its order: temperature, top-k, top-p, min-p and typical-p."""
    return tuple(parameter.value(name, params) for name, parameter in RESTRICT.items())


@dataclass(frozen=True)
class _Filters:
    """The filter settings of some rows, as columns [rows, 1]; None if no row uses the filter."""

    temperatures: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    log_min_p: torch.Tensor | None
    typical: torch.Tensor | None
    unfiltered: list[int]


@lru_cache(maxsize=64)  # successive steps have the same rows
def _filters(rows: tuple[tuple[float, ...], ...], device: torch.device) -> _Filters:
    temperatures, top_k, top_p, min_p, typical_p = zip(*rows, strict=True)

    def column(values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None]

    return _Filters(
        column([float(t) for t in temperatures]),
        column([k or 2**31 for k in top_k]) if any(top_k) else None,
        column([float(p) for p in top_p]) if min(top_p) < 1 else None,
        column([math.log(p) if p else -math.inf for p in min_p]) if any(min_p) else None,
        column([p < 1 for p in typical_p]) if min(typical_p) < 1 else None,
        [n for n, (_, k, p, m, t) in enumerate(rows) if not k and p >= 1 and not m and t >= 1],
    )


def _draw_filtered(
    scores: torch.Tensor, filters: _Filters, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one id per row from what its filters keep. Returns ids and certainty, both [rows].

    scores: float32 [rows, vocab], divided by the temperatures. A row is uncertain if its filters
    may keep an id outside the PREFILTER highest; its drawn id is then meaningless.
    """
    rows, vocabulary = scores.shape
    if len(filters.unfiltered) == rows:
        return draw(scores, uniforms), torch.ones(rows, dtype=torch.bool, device=scores.device)
    width = min(PREFILTER, vocabulary)
    top, ids = scores.topk(width, dim=-1)  # highest first
    kept = torch.ones_like(top, dtype=torch.bool)
    if filters.top_k is not None:  # ids that reach the k-th score, ties included
        kept = top >= top.gather(1, filters.top_k.clamp_max(width) - 1)
        kept |= filters.top_k > width
    if filters.top_p is not None:  # ids whose predecessors add up to less than p
        probabilities = scores.softmax(dim=-1).gather(1, ids)
        if filters.top_k is not None:  # renormalize what top-k keeps
            probabilities *= kept
            whole = probabilities.sum(dim=-1, keepdim=True)
            probabilities /= whole.masked_fill(filters.top_k > width, 1.0)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept &= (before < filters.top_p) | (filters.top_p >= 1.0)
    if filters.log_min_p is not None:  # ids with this share of the highest probability
        kept &= top >= top[:, :1] + filters.log_min_p
    # A row is certain if its filters drop the last id of the prefilter, or no id is outside it.
    certain = ~kept[:, -1] if width < vocabulary else torch.ones_like(kept[:, -1])
    if filters.top_k is not None and filters.top_p is not None:
        # Top-p's share counts all ids that top-k keeps; here some of them are outside.
        beyond = (filters.top_k > width) & (filters.top_k < vocabulary) & (filters.top_p < 1.0)
        certain &= ~beyond[:, 0]
    if filters.typical is not None:
        certain &= ~filters.typical[:, 0]  # typical-p needs all ids
    in_order = ids.argsort(dim=-1)  # `draw` needs the order of the vocabulary
    kept_scores = top.masked_fill(~kept, -math.inf).gather(1, in_order)
    drawn = draw(kept_scores, uniforms)
    chosen = ids.gather(1, in_order.gather(1, drawn[:, None])).squeeze(1)
    if filters.unfiltered:
        chosen[filters.unfiltered] = draw(scores[filters.unfiltered], uniforms[filters.unfiltered])
        certain[filters.unfiltered] = True
    return chosen, certain


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64

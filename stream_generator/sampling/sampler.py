"""From scores to ids: the one draw of the project, and all rows of a step at once."""

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stream_generator.errors import GenerationFailed
from stream_generator.request import Choice, Request
from stream_generator.sampling.processors import ADJUST, RESTRICT, processors
from stream_generator.sampling_params import SamplingParams

# Of a vocabulary of 50,000 to 130,000 ids, nearly always these hold all that top-p leaves; finding
# them costs a tenth of sorting all.
PREFILTER = 256

NOT_FINITE = (
    "the model returned NaN or infinite logits, or the sampling parameters forbid every token; "
    "with a half-precision model, try another dtype"
)

Sampled = Choice | GenerationFailed


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
    places = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return places.clamp_max(scores.shape[1] - 1)  # only NaN lies beyond; who calls checks for it


def uniform(generator: torch.Generator) -> float:
    """One number in [0, 1) with 53 random bits, from a CPU generator."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def generator_for(seed: int) -> torch.Generator:
    """A request's own generator. On the CPU, so that a seed means the same on every device."""
    return torch.Generator().manual_seed(seed)


def check_scores(scores: torch.Tensor) -> None:
    """Raise `GenerationFailed` where a row offers nothing to choose: NaN, infinite or all -inf.

    scores: float [rows, vocab]. Costs one reduction and one transfer.
    """
    if not torch.isfinite(scores.amax(dim=-1)).all():
        raise GenerationFailed(NOT_FINITE)


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Rows[Request]) -> list[Sampled]:
    """One id for each row, by its request's own parameters; or why that row has none.

    logits: float32 [rows, vocab], changed in place.
    Greedy rows share one maximum, rows without a filter one draw, all others one prefilter. All
    results come to the host in one transfer; a second one follows only for a row whose filter
    leaves more than the prefilter holds.
    """
    own = logits.log_softmax(dim=-1) if any(_wants(r) >= 0 for r in requests) else None
    for row, request in enumerate(requests):
        if adjust := processors(ADJUST, request):
            ids = torch.tensor([request.all_ids], device=logits.device)
            logits[row : row + 1] = adjust(ids, logits[row : row + 1])
    finite = torch.isfinite(logits.amax(dim=-1))
    certain = torch.ones_like(finite)
    drawn = [row for row, s in enumerate(requests) if not s.params.greedy]
    all_drawn = len(drawn) == len(requests)
    chosen = torch.zeros_like(finite, dtype=torch.int64) if all_drawn else logits.argmax(dim=-1)
    numbers = torch.zeros(len(requests), dtype=torch.float64)
    if drawn:
        numbers[drawn] = torch.tensor(
            [_number(requests[row]) for row in drawn], dtype=torch.float64
        )
        filters = _filters(
            tuple(_restrictions(requests[row].params) for row in drawn), logits.device
        )
        scores = (logits if all_drawn else logits[drawn]) / filters.temperatures
        ids, held = _draw_filtered(scores, filters, numbers[drawn])
        chosen[drawn], certain[drawn] = ids, held
    packed = [chosen[:, None], finite[:, None], certain[:, None]]
    if own is not None:
        packed += [own.gather(1, chosen[:, None]), *own.topk(max(map(_wants, requests)))]
    # Ids and flags are exact in float64, so that all of it fits into one transfer.
    results = torch.cat([part.double() for part in packed], dim=1).tolist()
    sampled: list[Sampled] = []
    for row, (token_id, is_finite, is_certain, *logprobs) in enumerate(results):
        if not is_finite:
            sampled.append(GenerationFailed(NOT_FINITE))
            continue
        if not is_certain:
            scores = processors(RESTRICT, requests[row])(None, logits[row : row + 1])
            token_id = int(draw(scores, numbers[row : row + 1]))
            logprobs[:1] = own[row, token_id : token_id + 1].tolist() if own is not None else []
        sampled.append(_choice(int(token_id), logprobs, _wants(requests[row])))
    return sampled


def _number(request: Request) -> float:
    """The number of a request's next draw; the same one if the step has to be tried again."""
    if request.number is None:
        request.number = uniform(request.generator)
    return request.number


def _wants(request: Request) -> int:
    """How many alternatives a request wants beside each id's log-probability; -1 for neither."""
    return -1 if request.params.logprobs is None else request.params.logprobs


def _choice(token_id: int, logprobs: list[float], wanted: int) -> Choice:
    """logprobs: of the id itself, then the highest of all, then the ids of these."""
    if wanted < 0:
        return Choice(token_id)
    own, count = logprobs[0], len(logprobs) // 2
    best = zip(logprobs[1 + count :], logprobs[1 : 1 + count], strict=True)
    return Choice(token_id, own, tuple((int(i), p) for i, p in best)[:wanted])


def _restrictions(params: SamplingParams) -> tuple[float, ...]:
    """The values of `RESTRICT`: temperature, top-k, top-p, min-p and typical-p."""
    return tuple(parameter.value(name, params) for name, parameter in RESTRICT.items())


@dataclass(frozen=True)
class _Filters:
    """The settings of some rows as columns, [rows, 1] each; None for what no row uses.

    free: the rows that no filter restricts.
    """

    temperatures: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    log_min_p: torch.Tensor | None
    typical: torch.Tensor | None
    free: list[int]


@lru_cache(maxsize=64)  # the same rows come step after step
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
    scores: torch.Tensor, filters: _Filters, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each row from what its filters leave: ids [rows], and whether each is certain.

    scores: float32 [rows, vocab], divided by the temperatures. A row is uncertain where its
    filters may leave an id outside the PREFILTER highest; its id is then of no meaning.
    """
    rows, vocabulary = scores.shape
    if len(filters.free) == rows:
        return draw(scores, numbers), torch.ones(rows, dtype=torch.bool, device=scores.device)
    width = min(PREFILTER, vocabulary)
    top, ids = scores.topk(width, dim=-1)  # falling
    kept = torch.ones_like(top, dtype=torch.bool)
    if filters.top_k is not None:  # all that reach the k-th score, ties included
        kept = top >= top.gather(1, filters.top_k.clamp_max(width) - 1)
        kept |= filters.top_k > width
    if filters.top_p is not None:  # all before which less than p has come
        probabilities = scores.softmax(dim=-1).gather(1, ids)
        if filters.top_k is not None:  # of what that has left
            probabilities *= kept
            whole = probabilities.sum(dim=-1, keepdim=True)
            probabilities /= whole.masked_fill(filters.top_k > width, 1.0)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept &= (before < filters.top_p) | (filters.top_p >= 1.0)
    if filters.log_min_p is not None:  # all that have that share of the highest probability
        kept &= top >= top[:, :1] + filters.log_min_p
    # Certain is what does not reach the last place of the prefilter, or has none beyond it.
    certain = ~kept[:, -1] if width < vocabulary else torch.ones_like(kept[:, -1])
    if filters.top_k is not None and filters.top_p is not None:
        # Top-p takes its share of all that top-k leaves, some of which lies beyond the prefilter.
        beyond = (filters.top_k > width) & (filters.top_k < vocabulary) & (filters.top_p < 1.0)
        certain &= ~beyond[:, 0]
    if filters.typical is not None:
        certain &= ~filters.typical[:, 0]
    in_order = ids.argsort(dim=-1)  # the draw goes by the order of the vocabulary
    kept_scores = top.masked_fill(~kept, -math.inf).gather(1, in_order)
    places = draw(kept_scores, numbers)
    chosen = ids.gather(1, in_order.gather(1, places[:, None])).squeeze(1)
    if filters.free:
        chosen[filters.free] = draw(scores[filters.free], numbers[filters.free])
        certain[filters.free] = True
    return chosen, certain


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64

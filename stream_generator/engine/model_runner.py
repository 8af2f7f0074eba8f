"""Forwards: a chunk of a prompt, or one token for many requests.

`ModelRunner` runs many requests in the slots of one cache, through transformers' own forward.
`SoloRunner` runs one at a time through `generate`, for models that do not fit the slot cache.
`runner_for` finds out which one a model needs, by trying.
"""

import inspect
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from stream_generator.engine.runner import Runner
from stream_generator.loop import stream_ids
from stream_generator.memory import slots_and_context
from stream_generator.model.config import attention_windows, refuse_what_rows_cannot_share
from stream_generator.model.fused import FusedDecoder, NotFusible
from stream_generator.model.kv_cache import (
    SlotCache,
    SlotRows,
    bytes_per_token,
    describe_slots,
    masks,
)
from stream_generator.request import Choice, Request
from stream_generator.sampling.sampler import Sampled, sample

logger = logging.getLogger(__name__)

# A mismatch of the slot cache with a plain forward, in standard deviations of the logits. On ids
# that make no sense together, roundings grow: 0.005 within one kind of product, 0.15 where few rows
# are packed and many dense. A wrong mask or position is far above.
PROBE_TOLERANCE = 0.3
PROBE = ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 1])  # ids that every vocabulary has


class Row(Protocol):
    """What a forward needs to know of a request."""

    slot: int | None
    num_computed_tokens: int


@dataclass
class _ProbeRow:
    slot: int | None
    num_computed_tokens: int


class ModelRunner:
    """Runs requests side by side in the slots of one cache."""

    keeps_prefixes = True
    has_logprobs = True
    smallest_chunk = 1
    reproducible = False

    def __init__(self, model: PreTrainedModel, filled: DynamicCache, slots: int, context: int):
        """filled: a cache that a forward of `model` has filled, for the shape of each layer."""
        self.slots = slots
        self.context_length = context
        self._model: Any = model
        self._cache = SlotCache(filled, slots, context)
        self._windows = attention_windows(model.config)
        accepted = inspect.signature(self._model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._decoder = _decoder(model, context)
        self._token_bytes = bytes_per_token(filled)

    def describe(self) -> str:
        return describe_slots(self.slots, self.context_length, self._token_bytes)

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + chunk
        logits = self.forward([request], [request.prompt_ids[start:end]])
        request.num_computed_tokens = end
        return sample(logits, [request])[0] if not request.num_uncomputed_tokens else None

    def decode(self, requests: list[Request]) -> list[Sampled]:
        # In the order of the slots: neighbours are read without a copy.
        ordered = sorted(requests, key=lambda s: s.slot or 0)
        logits = self.forward(ordered, [[r.output_ids[-1]] for r in ordered])
        drawn = dict(zip(map(id, ordered), sample(logits, ordered), strict=True))
        for request in ordered:
            request.num_computed_tokens += 1
        return [drawn[id(r)] for r in requests]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._cache.copy_slot(source, target, length)

    def release(self, request: Request, *, sound: bool) -> None:
        # Masked positions count 0 times their value: after a failure that could be 0 times NaN.
        if not sound and request.slot is not None:
            self._cache.wipe_slot(request.slot)

    @torch.inference_mode()
    def forward(self, row_states: Collection[Row], new_ids: list[list[int]]) -> torch.Tensor:
        """Logits after the last of the new ids of each row: float32 [rows, vocab].

        new_ids: as many for each row; they follow what is `num_computed_tokens` in the row's slot.
        """
        rows = SlotRows(
            slots=tuple(row.slot or 0 for row in row_states),
            starts=tuple(row.num_computed_tokens for row in row_states),
            length=len(new_ids[0]),
            windowed=any(self._windows.values()),
        )
        device = self._model.device
        self._cache.select(rows)
        ids = torch.tensor(new_ids, device=device)
        mask = masks(rows, self._windows, device, self._model.dtype)
        if self._decoder is not None:
            logits = self._decoder(ids, rows.positions(device), mask, self._cache)
        else:
            logits = self._model(
                input_ids=ids,
                position_ids=rows.positions(device),
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                **self._options,
            ).logits[:, -1]
        return logits.to(torch.float32, copy=True)


def _decoder(model: PreTrainedModel, context: int) -> FusedDecoder | None:
    """The model's layers called without its wrapping, where that computes the same."""
    try:
        return FusedDecoder(model, context)
    except NotFusible as reason:
        logger.debug("%s is called as a whole: %s", type(model).__name__, reason)
        return None


class SoloRunner:
    """Runs one request at a time through `generate`, with whatever cache the model likes."""

    keeps_prefixes = False
    has_logprobs = False
    smallest_chunk = 1
    reproducible = False

    def __init__(self, model: PreTrainedModel, context_length: int):
        self.slots = 1
        self.context_length = context_length
        self._model = model
        self._steps: Iterator[int] = iter(())
        self._owner: Request | None = None

    def describe(self) -> str:
        return f"one request at a time of up to {self.context_length} tokens"

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        self._steps, self._owner = stream_ids(self._model, request), request
        request.num_computed_tokens = len(request.prompt_ids)
        return Choice(next(self._steps))

    def decode(self, requests: list[Request]) -> list[Sampled]:
        return [Choice(next(self._steps))]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        raise AssertionError("a request that runs alone keeps nothing for others")

    def release(self, request: Request, *, sound: bool) -> None:
        if request is self._owner:
            self._steps, self._owner = iter(()), None


def runner_for(
    model: PreTrainedModel,
    context_length: int,
    *,
    max_concurrent: int | None = None,
    max_context: int | None = None,
) -> Runner:
    """The runner that fits `model`; what is not given follows from the memory there is.

    context_length: the model's own, in tokens. Raises `CheckpointError` if the memory that is
    asked for is not there.
    """
    context = min(context_length, max_context or context_length)
    # cuDNN's attention prepares itself anew for each key length, which is a new one at every step:
    # 60 ms for a step that takes 10 (docs/performance.md).
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        refuse_what_rows_cannot_share(model.config, model.generation_config)
        filled = DynamicCache()
        expected = [_plain_logits(model, PROBE[0], filled), _plain_logits(model, PROBE[1])]
        _probe(ModelRunner(model, filled, slots=3, context=len(PROBE[0])), expected)
    except Exception as error:  # whatever a foreign model raises, it means the same
        logger.warning(
            "%s runs one request at a time: it does not fit the slot cache (%s)",
            type(model).__name__,
            error,
        )
        return SoloRunner(model, context)
    slots, context = slots_and_context(
        model.device, bytes_per_token(filled), context, max_concurrent, max_context
    )
    return ModelRunner(model, filled, slots, context)


@torch.inference_mode()
def _plain_logits(model: Any, ids: list[int], cache: DynamicCache | None = None) -> torch.Tensor:
    """The logits after `ids` by a forward that knows nothing of slots: float32 [vocab]."""
    inputs = torch.tensor([ids], device=model.device)
    outputs = model(input_ids=inputs, past_key_values=cache, use_cache=cache is not None)
    logits: torch.Tensor = outputs.logits[0, -1].float()
    return logits


def _probe(runner: ModelRunner, expected: list[torch.Tensor]) -> None:
    """Run two rows of different length, in chunks and then together, against a plain forward."""
    rows = []
    for slot, ids in zip((2, 0), PROBE, strict=True):
        row = _ProbeRow(slot, 0)
        for start, end in ((0, 2), (2, len(ids) - 1)):
            runner.forward([row], [ids[start:end]])
            row.num_computed_tokens = end
        rows.append(row)
    logits = runner.forward(rows, [[ids[-1]] for ids in PROBE])
    for ours, theirs in zip(logits, expected, strict=True):
        error = float((ours - theirs).std() / theirs.std().clamp_min(1e-9))
        if not error < PROBE_TOLERANCE:
            raise ValueError(f"its logits there differ by {error:.2f} standard deviations")

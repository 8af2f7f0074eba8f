"""Run many requests on PyTorch layers, in the slots of one cache."""

import inspect
import logging
from collections.abc import Collection
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from stream_generator.model.captured_steps import CapturedSteps
from stream_generator.model.config import attention_windows
from stream_generator.model.fused import FusedDecoder, NotFusible
from stream_generator.model.kv_cache import (
    SlotCache,
    SlotRows,
    bytes_per_token,
    describe_slots,
    masks,
)
from stream_generator.request import Request
from stream_generator.sampling.sampler import Sampled, sample

logger = logging.getLogger(__name__)


class Row(Protocol):
    """The fields of a request that a forward reads."""

    slot: int | None
    num_computed_tokens: int


class ModelRunner:
    """Runs requests together, each in its own slot of one cache."""

    keeps_prefixes = True
    has_logprobs = True
    smallest_chunk = 1
    reproducible = False

    def __init__(self, model: PreTrainedModel, filled: DynamicCache, slots: int, context: int):
        """filled: a cache that a forward of `model` has filled; gives the shape of each layer."""
        self.slots = slots
        self.context_length = context
        self._model: Any = model
        self.cache = SlotCache(filled, slots, context)
        self._windows = attention_windows(model.config)
        accepted = inspect.signature(self._model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._decoder = _decoder(model, context)
        self.captured_steps = _captured(self._decoder, self.cache, self._windows)
        self._token_bytes = bytes_per_token(filled)

    def describe(self) -> str:
        layers = "transformers' layers" if self._decoder is None else "fused layers"
        if self.captured_steps is not None:
            layers += " and CUDA graphs"
        slots = describe_slots(self.slots, self.context_length, self._token_bytes)
        return f"{layers} run {slots}"

    def prefill(self, request: Request, chunk: int) -> Sampled | None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + chunk
        logits = self.forward([request], [request.prompt_ids[start:end]])
        request.num_computed_tokens = end
        return sample(logits, [request])[0] if not request.num_uncomputed_tokens else None

    def decode(self, requests: list[Request]) -> list[Sampled]:
        # In the order of slots, because adjacent slots are read without a copy.
        ordered = sorted(requests, key=lambda s: s.slot or 0)
        logits = self.forward(ordered, [[r.output_ids[-1]] for r in ordered])
        drawn = dict(zip(map(id, ordered), sample(logits, ordered), strict=True))
        for request in ordered:
            request.num_computed_tokens += 1
        return [drawn[id(r)] for r in requests]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.cache.copy_slot(source, target, length)

    def release(self, request: Request, *, sound: bool) -> None:
        # A failed request may leave NaN. A mask does not hide NaN, because 0 times NaN is NaN.
        if not sound and request.slot is not None:
            self.cache.wipe_slot(request.slot)

    @torch.inference_mode()
    def forward(self, row_states: Collection[Row], new_ids: list[list[int]]) -> torch.Tensor:
        """Run the model on the new ids of each row. They follow the `num_computed_tokens` ids that
        the row's slot holds.

        Each row has the same number of new ids. Returns the logits after the last new id of each
        row: float32 [rows, vocab].
        """
        rows = SlotRows(
            slots=tuple(row.slot or 0 for row in row_states),
            starts=tuple(row.num_computed_tokens for row in row_states),
            length=len(new_ids[0]),
            windowed=any(self._windows.values()),
        )
        if self.captured_steps is not None and rows.length == 1:
            try:
                return self.captured_steps([new[0] for new in new_ids], rows)
            except torch.OutOfMemoryError:  # a graph that is captured needs memory of its own
                logger.warning("memory is short: steps now run without CUDA graphs, more slowly")
                self.captured_steps = None
        device = self._model.device
        self.cache.select(rows)
        ids = torch.tensor(new_ids, device=device)
        by_kind = masks(rows, self._windows, device, self._model.dtype)
        if self._decoder is not None:
            logits = self._decoder(ids, rows.positions(device), by_kind, self.cache)
        else:
            logits = self._model(
                input_ids=ids,
                position_ids=rows.positions(device),
                attention_mask=by_kind.get("", by_kind),
                past_key_values=self.cache,
                use_cache=True,
                **self._options,
            ).logits[:, -1]
        return logits.to(torch.float32, copy=True)


def _decoder(model: PreTrainedModel, context: int) -> FusedDecoder | None:
    """Return the model's fused layers, or None if the model needs its own forward."""
    try:
        return FusedDecoder(model, context)
    except NotFusible as reason:
        logger.debug("%s runs through its own forward: %s", type(model).__name__, reason)
        return None


def _captured(
    decoder: FusedDecoder | None, cache: SlotCache, windows: dict[str, int | None]
) -> CapturedSteps | None:
    """Return the decoder's steps as CUDA graphs, or None if they cannot be captured."""
    if decoder is None or cache.layers[0].keys.device.type != "cuda":
        return None
    try:
        return CapturedSteps(decoder, cache, windows)
    except NotFusible as reason:
        logger.warning("steps run without CUDA graphs, which is slower: %s", reason)
        return None

"""Test whether a model works with the slot cache, by comparing its logits with those of a plain
forward."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from stream_generator.engine.model_runner import ModelRunner
from stream_generator.model.config import require_batchable
from stream_generator.model.longrope import has_fixed_frequencies

# The largest accepted difference from a plain forward, in standard deviations of the logits. On
# meaningless ids rounding gives 0.005 with one kind of product, and 0.15 where few rows are packed
# and many rows are dense. A wrong mask or position gives far more.
PROBE_TOLERANCE = 0.3
PROBE = ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 1])  # ids that every vocabulary contains


@dataclass
class _ProbeRow:
    slot: int | None
    num_computed_tokens: int


def filled_cache(model: PreTrainedModel) -> DynamicCache:
    """Test the model. Return a cache that one forward has filled.

    Raises `ValueError`, or any error of the model itself, if `ModelRunner` cannot run the model.
    """
    fixed = has_fixed_frequencies(model)
    require_batchable(model.config, model.generation_config, has_fixed_frequencies=fixed)
    cache = DynamicCache()
    expected = [_plain_logits(model, PROBE[0], cache), _plain_logits(model, PROBE[1])]
    _probe(ModelRunner(model, cache, slots=3, context=len(PROBE[0])), expected)
    return cache


@torch.inference_mode()
def _plain_logits(model: Any, ids: list[int], cache: DynamicCache | None = None) -> torch.Tensor:
    """Compute the logits after `ids` without slots: float32 [vocab]."""
    inputs = torch.tensor([ids], device=model.device)
    outputs = model(input_ids=inputs, past_key_values=cache, use_cache=cache is not None)
    logits: torch.Tensor = outputs.logits[0, -1].float()
    return logits


def _probe(runner: ModelRunner, expected: list[torch.Tensor]) -> None:
    """Compute two rows of different length, in chunks and then together. Compare the logits."""
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
            raise ValueError(f"logits in its slots differ by {error:.2f} standard deviations")

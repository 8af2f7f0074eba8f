"""Forwards: a chunk of a prompt, or one token for many sequences.

`ModelRunner` runs many sequences in the slots of one cache, through transformers' own forward.
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

from stream_generator.errors import CheckpointError
from stream_generator.fused import FusedDecoder, NotFusible
from stream_generator.generate import stream_ids
from stream_generator.kv_cache import SlotCache, SlotRows, bytes_per_token, masks
from stream_generator.memory import free_memory
from stream_generator.sampler import Sampled, sample
from stream_generator.sequence import Choice, Sequence

logger = logging.getLogger(__name__)

MOST_SLOTS = 32
FEWEST_SLOTS = 4  # before that, slots are made shorter
SHORTEST_CONTEXT = 2048
MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.8}  # of what is free once the model is loaded

# A mismatch of the slot cache with a plain forward, in standard deviations of the logits. On ids
# that make no sense together, roundings grow: 0.005 within one kind of product, 0.15 where few rows
# are packed and many dense. A wrong mask or position is far above.
PROBE_TOLERANCE = 0.3
PROBE = ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 1])  # ids that every vocabulary has


class Runner(Protocol):
    """What the engine asks of a runner."""

    slots: int
    context_length: int
    keeps_prefixes: bool  # whether a slot's contents outlive its sequence
    has_logprobs: bool  # whether it can tell the model's own distribution

    def describe(self) -> str:
        """How many requests of what length, and in how much memory, for a person."""

    def prefill(self, sequence: Sequence, chunk: int) -> Sampled | None:
        """Compute `chunk` more ids of the prompt; the first new id when it is complete."""

    def decode(self, sequences: list[Sequence]) -> list[Sampled]:
        """One new id for each, or the reason why a row alone has none."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot `target` what slot `source` holds of the first `length` positions."""

    def release(self, sequence: Sequence, *, sound: bool) -> None:
        """The sequence has ended; not sound: what it has computed must not be met again."""


class Row(Protocol):
    """What a forward needs to know of a sequence."""

    slot: int | None
    computed: int


@dataclass
class _ProbeRow:
    slot: int | None
    computed: int


class ModelRunner:
    """Runs sequences side by side in the slots of one cache."""

    keeps_prefixes = True
    has_logprobs = True

    def __init__(self, model: PreTrainedModel, filled: DynamicCache, slots: int, context: int):
        """filled: a cache that a forward of `model` has filled, for the shape of each layer."""
        self.slots = slots
        self.context_length = context
        self._model: Any = model
        self._cache = SlotCache(filled, slots, context)
        self._windows = attention_windows(model)
        accepted = inspect.signature(self._model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._decoder = _decoder(model, context)
        self._bytes = slots * context * bytes_per_token(filled)

    def describe(self) -> str:
        return (
            f"up to {self.slots} requests at a time of up to {self.context_length} tokens each, "
            f"{self._bytes / 1e9:.1f} GB for keys and values when all are full"
        )

    def prefill(self, sequence: Sequence, chunk: int) -> Sampled | None:
        start, end = sequence.computed, sequence.computed + chunk
        logits = self.forward([sequence], [sequence.prompt_ids[start:end]])
        sequence.computed = end
        return sample(logits, [sequence])[0] if sequence.is_prefilled else None

    def decode(self, sequences: list[Sequence]) -> list[Sampled]:
        # In the order of the slots: neighbours are read without a copy.
        ordered = sorted(sequences, key=lambda s: s.slot or 0)
        logits = self.forward(ordered, [[s.output_ids[-1]] for s in ordered])
        drawn = dict(zip(map(id, ordered), sample(logits, ordered), strict=True))
        for sequence in ordered:
            sequence.computed += 1
        return [drawn[id(s)] for s in sequences]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self._cache.copy_slot(source, target, length)

    def release(self, sequence: Sequence, *, sound: bool) -> None:
        # Masked positions count 0 times their value: after a failure that could be 0 times NaN.
        if not sound and sequence.slot is not None:
            self._cache.wipe_slot(sequence.slot)

    @torch.inference_mode()
    def forward(self, row_states: Collection[Row], new_ids: list[list[int]]) -> torch.Tensor:
        """Logits after the last of the new ids of each row: float32 [rows, vocab].

        new_ids: as many for each row; they follow what is `computed` in the row's slot.
        """
        rows = SlotRows(
            slots=tuple(row.slot or 0 for row in row_states),
            starts=tuple(row.computed for row in row_states),
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
    """Runs one sequence at a time through `generate`, with whatever cache the model likes."""

    keeps_prefixes = False
    has_logprobs = False

    def __init__(self, model: PreTrainedModel, context_length: int):
        self.slots = 1
        self.context_length = context_length
        self._model = model
        self._steps: Iterator[int] = iter(())
        self._owner: Sequence | None = None

    def describe(self) -> str:
        return f"one request at a time of up to {self.context_length} tokens"

    def prefill(self, sequence: Sequence, chunk: int) -> Sampled | None:
        self._steps, self._owner = stream_ids(self._model, sequence), sequence
        sequence.computed = len(sequence.prompt_ids)
        return Choice(next(self._steps))

    def decode(self, sequences: list[Sequence]) -> list[Sampled]:
        return [Choice(next(self._steps))]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        raise AssertionError("a sequence that runs alone keeps nothing for others")

    def release(self, sequence: Sequence, *, sound: bool) -> None:
        if sequence is self._owner:
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
        _refuse_what_rows_cannot_share(model)
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
    slots, context = _sizes(
        model.device, bytes_per_token(filled), context, max_concurrent, max_context
    )
    return ModelRunner(model, filled, slots, context)


# Settings of a checkpoint's generation config that only transformers' own loop applies.
_LOOP_SETTINGS = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "guidance_scale", "watermarking_config", "epsilon_cutoff", "eta_cutoff", "top_h",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip


def _refuse_what_rows_cannot_share(model: PreTrainedModel) -> None:
    """Raise `ValueError` for what a short probe does not show."""
    config = model.config.get_text_config()
    rope = repr([getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")])
    for kind in ("dynamic", "longrope"):  # the longest row would set the frequencies of all
        if f"'{kind}'" in rope:
            raise ValueError(f"rotary embeddings of the kind {kind}")
    if "local" in (getattr(config, "attention_layers", None) or ()):  # a window of GPT-Neo's own
        raise ValueError("local attention layers")
    for name in _LOOP_SETTINGS:
        if getattr(model.generation_config, name, None):
            raise ValueError(f"its generation config sets {name}")


def attention_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """How far back each kind of layer looks: by kind as in `config.layer_types`, or "" for all.

    Raises `ValueError` for a kind that no mask can express (recurrent layers, chunks).
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of the kind {', '.join(sorted(unknown))}")
    if not kinds:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


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
            row.computed = end
        rows.append(row)
    logits = runner.forward(rows, [[ids[-1]] for ids in PROBE])
    for ours, theirs in zip(logits, expected, strict=True):
        error = float((ours - theirs).std() / theirs.std().clamp_min(1e-9))
        if not error < PROBE_TOLERANCE:
            raise ValueError(f"its logits there differ by {error:.2f} standard deviations")


def _sizes(
    device: torch.device,
    token_bytes: int,
    context: int,
    max_concurrent: int | None,
    max_context: int | None,
) -> tuple[int, int]:
    """How many slots, and how long, fit into the memory that is free now."""
    free = free_memory(device)
    budget = int(free * MEMORY_SHARE.get(device.type, 0.4))
    wanted = max_concurrent or FEWEST_SLOTS
    while (
        not max_context and context > SHORTEST_CONTEXT and wanted * context * token_bytes > budget
    ):
        context = max(context // 2, SHORTEST_CONTEXT)
    slots = max_concurrent or min(MOST_SLOTS, max(1, budget // (context * token_bytes)))
    if slots * context * token_bytes > free:
        raise CheckpointError(
            f"{slots} requests of {context} tokens need {slots * context * token_bytes / 1e9:.1f} "
            f"GB for keys and values, but {free / 1e9:.1f} GB are free; lower --max-concurrent or "
            "--max-context"
        )
    return slots, context

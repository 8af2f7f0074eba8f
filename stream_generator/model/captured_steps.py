"""Decode steps on an NVIDIA GPU, captured once and replayed.

A step of an 8B model starts some 600 kernels. Python needs longer to start them than the GPU needs
to run them. A CUDA graph holds all kernels of a step, and one call starts them. A graph has fixed
shapes and addresses, so each number of rows has its own graph, and the rows' ids, slots and
positions are read from a tensor that stays in place.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from stream_generator.model.fused import FusedDecoder, NotFusible, require_same
from stream_generator.model.gpu_kernels import inside_a_graph
from stream_generator.model.kv_cache import SlotCache, SlotLayer, SlotRows, masks

logger = logging.getLogger(__name__)

SHORTEST_KEYS = 1024  # the shortest key length for which a graph is captured, in tokens
# The largest accepted difference from the same step without a graph, in standard deviations. The
# attention kernels differ, so roundings do.
TOLERANCE = 0.1


class CapturedSteps:
    """The decode steps of a fused model as CUDA graphs, captured when they are first needed."""

    def __init__(
        self, decoder: FusedDecoder, cache: SlotCache, windows: dict[str, int | None]
    ) -> None:
        """windows: as `attention_windows` returns them.

        Raises `NotFusible` if the steps cannot be captured, or compute other logits than `decoder`.
        """
        layer = cache.layers[0]
        device, dtype = layer.keys.device, layer.keys.dtype
        if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
            raise NotFusible(f"graphs need an NVIDIA GPU and half precision, not {device}, {dtype}")
        if any(other.keys.shape != layer.keys.shape for other in cache.layers):
            raise NotFusible("the layers differ in the shape of their keys")
        self._decoder, self._cache, self._windows = decoder, cache, windows
        self._layer_windows = [windows[kind] for kind in decoder.kinds]
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Any, Any]] = {}
        self._memory = torch.cuda.graph_pool_handle()  # one graph runs at a time: all share it
        self._check(device, dtype)

    def __call__(self, ids: list[int], rows: SlotRows) -> torch.Tensor:
        """Compute the logits of one new token per row: float32 [rows, vocabulary].

        ids: the new token of each row. rows: `SlotRows` with a length of 1. The result is valid
        until the next call.
        """
        count = min(next_power_of_two(len(ids)), self._cache.slots)
        most_keys = min(
            max(next_power_of_two(rows.key_length), SHORTEST_KEYS), self._cache.context_length
        )
        # Rows that fill up a graph repeat the first row: they write the same to the same place.
        missing = count - len(ids)
        inputs = torch.tensor(
            [[*row, *row[:1] * missing] for row in (ids, list(rows.slots), list(rows.starts))]
        )
        captured = self.graphs.get((count, most_keys))
        if captured is None:
            captured = self.graphs[count, most_keys] = self._capture(inputs, most_keys)
        graph, static_inputs, logits = captured
        static_inputs.copy_(inputs)
        graph.replay()
        return logits[: len(ids)]

    def _capture(
        self, inputs: torch.Tensor, most_keys: int
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        """Capture the step for this number of rows. Runs it once first, which writes what its
        replay writes.
        """
        static_inputs = inputs.to(self._cache.layers[0].keys.device)

        def step() -> torch.Tensor:
            ids, slots, positions = static_inputs
            view = DecodeRows(self._cache, slots, positions, self._layer_windows, most_keys)
            kinds = dict.fromkeys(self._windows)
            with inside_a_graph():
                return self._decoder(ids[:, None], positions[:, None], kinds, view).float()

        _run_beside(step)  # kernels and workspaces are loaded at the first call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = step()
        return graph, static_inputs, logits

    @torch.inference_mode()
    def _check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compare a captured step with the decoder's own, at the beginning of an empty cache."""
        slots = range(min(2, self._cache.slots))
        for position in range(3):  # the later steps read what the earlier ones wrote
            rows = SlotRows(
                tuple(slots), tuple(position for _ in slots), 1, any(self._windows.values())
            )
            ids = [1 + position + slot for slot in slots]
            try:
                ours = self(ids, rows).clone()
            except Exception as error:  # a kernel that this GPU or this PyTorch lacks
                raise NotFusible(f"a step could not be captured: {error}") from error
            self._cache.select(rows)
            by_kind = masks(rows, self._windows, device, dtype)
            new = torch.tensor(ids, device=device)[:, None]
            expected = self._decoder(new, rows.positions(device), by_kind, self._cache).float()
            require_same(ours, expected, TOLERANCE, "a captured step")


class DecodeRows:
    """Rows of one new token each, with slots and positions in tensors that a graph reads.

    Offers `attend`, as `SlotCache` does. No shape depends on the values in the tensors.
    """

    def __init__(
        self,
        cache: SlotCache,
        slots: torch.Tensor,
        positions: torch.Tensor,
        windows: list[int | None],
        most_keys: int,
    ):
        """slots, positions: int64 [rows]. windows: how many positions each layer sees; None for
        all. most_keys: an upper bound of the rows' key lengths.
        """
        self._layers: list[SlotLayer] = cache.layers
        self._windows, self._most_keys = windows, most_keys
        store = self._layers[0].store
        _, heads, context, _ = store.shape
        device = store.device
        by_head = slots[:, None] * heads + torch.arange(heads, device=device)
        self._write_at = (by_head * context + positions[:, None]).flatten()
        first_tokens = slots * (heads * context)
        self._first_tokens = torch.cat((first_tokens, first_tokens[-1:])).int()
        self._key_lengths = (positions + 1).int()
        self._queries = torch.arange(len(slots) + 1, dtype=torch.int32, device=device)

    def attend(
        self,
        layer_index: int,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Write a layer's new states; attend to the slots. mask: not read.

        See `AttendingCache.attend`, with a length of 1.
        """
        layer = self._layers[layer_index]
        layer.store.view(-1, states.shape[-1]).index_copy_(0, self._write_at, states.flatten(0, 2))
        window = self._windows[layer_index]
        # PyTorch's FlashAttention. It reads as many keys of each row as `seqused_k` says, from the
        # token `cum_seq_k`, so no mask is needed, and no key is copied.
        context: torch.Tensor = torch.ops.aten._flash_attention_forward(
            queries.flatten(0, 1),
            tokens_of(layer.keys),
            tokens_of(layer.values),
            self._queries,
            self._first_tokens,
            1,
            self._most_keys,
            0.0,  # dropout
            False,  # is_causal: a row's only query sees all of its keys
            False,  # return_debug_mask
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
            seqused_k=self._key_lengths,
        )[0]
        heads: torch.Tensor = context.flatten(1)
        return heads


def tokens_of(states: torch.Tensor) -> torch.Tensor:
    """View the keys or values of a `SlotLayer` as one list of tokens: [tokens, heads, head size].

    states: [slots, key heads, context, head size], the keys' or the values' half of a layer's
    store. Position p of slot s is token s * (slot's stride / head size) + p. Between the last
    position of a slot and the first of the next, the memory holds other heads; tokens with these
    indices are not valid.
    """
    slots, heads, context, size = states.shape
    slot_stride, head_stride, _, _ = states.stride()
    tokens = (slots - 1) * (slot_stride // size) + context
    return states.as_strided((tokens, heads, size), (size, head_stride, 1))


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _run_beside(step: Callable[[], object]) -> None:
    """Run a step on a stream of its own, as the capture will."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)

"""The slot cache: the keys and values of many slots, each at its own position.

A slot holds `context_length` positions of one request. Each row of a forward reads and writes one
slot, from a start position of its own. Keys and values never move within a slot. On a CPU, memory
is reserved once, and the operating system provides each page when it is first written.
"""

import math
import mmap
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from stream_generator.model.attention import attend

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Adjacent rows of a forward whose slots are adjacent too, so that one view has all keys.

    rows: indices of the rows in the forward. slots: the slots of these rows.
    key_length: number of keys of the longest row. needs_mask: causal attention would be wrong.
    """

    rows: slice
    slots: slice
    key_length: int
    needs_mask: bool

    def view(self, store: torch.Tensor) -> torch.Tensor:
        """The run's part of keys or values: [rows of the run, key heads, key length, head size]."""
        # One operation in place of the three of store[self.slots, :, :self.key_length].
        _, heads, _, size = store.shape
        strides = store.stride()
        start = store.storage_offset() + self.slots.start * strides[0]
        rows = self.slots.stop - self.slots.start
        return store.as_strided((rows, heads, self.key_length, size), strides, start)

    def slice_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The run's part of a forward's mask; None if the run needs no mask."""
        if mask is None or not self.needs_mask:
            return None
        return mask[self.rows, :, :, : self.key_length]


@dataclass(frozen=True)
class SlotRows:
    """The rows of the next forward, one row per slot that takes part.

    slots: the slot of each row. starts: the position of the first new token of each row.
    length: new tokens per row. windowed: some layers have a sliding window.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    windowed: bool = False

    @property
    def key_length(self) -> int:
        """The number of keys of the longest row."""
        return max(self.starts) + self.length

    @cached_property
    def runs(self) -> list[Run]:
        """The rows in as few runs as possible."""
        runs: list[Run] = []
        first = 0
        for row in range(1, len(self.slots) + 1):
            if row < len(self.slots) and self.slots[row] == self.slots[row - 1] + 1:
                continue
            starts = self.starts[first:row]
            # Without a mask, one new token sees all keys, and several must begin at position 0.
            is_causal = len(set(starts)) == 1 and (self.length == 1 or starts[0] == 0)
            runs.append(
                Run(
                    slice(first, row),
                    slice(self.slots[first], self.slots[first] + row - first),
                    max(starts) + self.length,
                    needs_mask=self.windowed or not is_causal,
                )
            )
            first = row
        return runs

    def positions(self, device: torch.device) -> torch.Tensor:
        """The positions of the new tokens: int64 [rows, length]."""
        starts = torch.tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(self.length, device=device)


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values: [slots, key heads, context length, head size] each."""

    is_sliding = False  # the masks hide what a sliding window excludes

    def __init__(self, slots: int, context_length: int, like: tuple[torch.Tensor, torch.Tensor]):
        """like: the layer's keys and values in another cache, [rows, heads, tokens, head size]."""
        super().__init__()
        key_heads, value_heads = (t.shape[1] for t in like)
        self._stores: tuple[torch.Tensor, ...]
        if like[0].shape[3] == like[1].shape[3]:  # one tensor for both needs only one write
            shape = (slots, key_heads + value_heads, context_length, like[0].shape[3])
            store = zeros(shape, like[0].dtype, like[0].device)
            self.keys, self.values = store.split([key_heads, value_heads], dim=1)
            self._stores = (store,)
        else:
            self.keys, self.values = self._stores = tuple(
                zeros((slots, t.shape[1], context_length, t.shape[3]), t.dtype, t.device)
                for t in like
            )
        self.is_initialized = True
        self.rows: SlotRows | None = None

    @property
    def store(self) -> torch.Tensor:
        """The keys, then the values: [slots, key heads + value heads, context length, head size].

        Raises `ValueError` if keys and values differ in head size.
        """
        (store,) = self._stores
        return store

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: `__init__` has allocated all memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' states; return the keys and values of the rows.

        key_states, value_states: [rows, key heads, length, head size].
        Returns keys and values: [rows, key heads, key length, head size] each. The mask must hide
        the positions after a row's last token, whose content has no meaning.
        """
        states = [key_states, value_states]
        if len(self._stores) == 1:
            states = [torch.cat(states, dim=1)]
        rows = self.write(*(s.transpose(1, 2) for s in states))
        return self._read(self.keys, rows), self._read(self.values, rows)

    def write(self, *states: torch.Tensor) -> SlotRows:
        """Write the new tokens' states into the rows' slots; return the rows.

        states: [rows, length, key heads + value heads, head size]. If the head sizes of keys and
        values differ: two tensors, [rows, length, heads, head size] each.
        """
        rows = self.rows
        assert rows is not None, "call SlotCache.select before a forward"
        for store, new in zip(self._stores, states, strict=True):
            if rows.length == 1:
                _, heads, context, size = store.shape
                positions = _flat_positions(rows, heads, context, store.device)
                store.view(-1, size).index_copy_(0, positions, new.reshape(-1, size))
                continue
            for row, (slot, start) in enumerate(zip(rows.slots, rows.starts, strict=True)):
                store[slot, :, start : start + rows.length] = new[row].transpose(0, 1)
        return rows

    def copy_slot(self, source: int, target: int, length: int) -> None:
        for store in self._stores:
            store[target, :, :length] = store[source, :, :length]

    def wipe_slot(self, slot: int) -> None:
        for store in self._stores:
            store[slot].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.rows.key_length if self.rows else query_length), 0

    def get_seq_length(self) -> int:
        return max(self.rows.starts) if self.rows else 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    @staticmethod
    def _read(store: torch.Tensor, rows: SlotRows) -> torch.Tensor:
        if len(rows.runs) == 1:
            return rows.runs[0].view(store)  # one view, no copy
        return store[:, :, : rows.key_length][list(rows.slots)]


@runtime_checkable
class AttendingCache(Protocol):
    """A cache that computes the attention to what it holds."""

    def attend(
        self,
        layer_index: int,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Write a layer's new states; return each query's attention to its row's slot.

        queries: [rows, length, query heads, head size]. states: keys, then values, [rows, length,
        key heads + value heads, head size]. mask: see `attention.attend`.
        Returns [rows * length, query heads * head size].
        """


class SlotCache(Cache):  # type: ignore[misc]
    """A transformers cache in which every row has its own length.

    Before each forward, `select` sets its rows. The forward's `position_ids` and mask (see `masks`)
    must be made for the same rows.
    """

    def __init__(self, like: Cache, slots: int, context_length: int):
        """like: a cache that a forward of the model has filled, for the shape of each layer."""
        self.slots = slots
        self.context_length = context_length
        super().__init__(
            layers=[SlotLayer(slots, context_length, (x.keys, x.values)) for x in like.layers]
        )

    def select(self, rows: SlotRows) -> None:
        for layer in self.layers:
            layer.rows = rows

    def attend(
        self,
        layer_index: int,
        queries: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Write a layer's new states; attend to the slots, one run of the rows after the other.

        (`update` returns the keys of all rows in one tensor, so it copies if there are several
        runs.)
        """
        layer = self.layers[layer_index]
        rows = layer.write(states)
        parts = [
            attend(
                queries[run.rows],
                run.view(layer.keys),
                run.view(layer.values),
                run.slice_mask(mask),
                scale,
            )
            for run in rows.runs
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for layer in self.layers:
            layer.copy_slot(source, target, length)

    def wipe_slot(self, slot: int) -> None:
        for layer in self.layers:
            layer.wipe_slot(slot)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Allocate zeros for keys or values.

    On a CPU, the operating system provides each page when it is first written; torch.zeros would
    write, and so occupy, all memory now. A new token writes to one place in every head of every
    layer. With huge pages, each of these places would occupy 2 MB, so the pages are small.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@lru_cache(maxsize=8)  # all layers of a step have the same rows
def _flat_positions(rows: SlotRows, heads: int, context: int, device: torch.device) -> torch.Tensor:
    """Indices of one new token per row in [slots * heads * context]: int64 [rows * heads]."""
    slots, starts = torch.tensor([rows.slots, rows.starts], device=device)
    by_head = slots[:, None] * heads + torch.arange(heads, device=device)
    return torch.flatten(by_head * context + starts[:, None])


def bytes_per_token(filled: Cache) -> int:
    """Bytes per position, over all layers. filled: a cache that a forward has filled."""
    return sum(
        t.shape[1] * t.shape[3] * t.element_size()
        for layer in filled.layers
        for t in (layer.keys, layer.values)
    )


def describe_slots(slots: int, context_length: int, token_bytes: int) -> str:
    """Describe the number of slots, their length and their memory, for the log."""
    return (
        f"up to {slots} requests at a time, with up to {context_length} tokens each; their keys "
        f"and values take up to {slots * context_length * token_bytes / 1e9:.1f} GB"
    )


def masks(
    rows: SlotRows, windows: dict[str, int | None], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Create the masks of a forward: one per kind of layer, [rows, 1, length, key length].

    A mask is added to the scores: 0 for a visible key, -inf for a hidden one.
    windows: the number of positions that each kind of layer sees, see `attention_windows`.
    """
    queries = rows.positions(device)[:, None, :, None]
    keys = torch.arange(rows.key_length, device=device)
    future = keys > queries
    masks_by_kind = {}
    for kind, window in windows.items():
        hidden = future if window is None else future | (keys <= queries - window)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        masks_by_kind[kind] = mask.masked_fill_(hidden, -math.inf)
    return masks_by_kind

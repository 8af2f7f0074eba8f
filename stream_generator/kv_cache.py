"""The slot cache: one row of keys and values for each sequence, all at different positions.

A slot holds `context_length` positions. A forward takes some slots, each from a position of its
own; the keys of a token stay where they were first written until the slot is given to another
sequence. Memory is reserved once; an operating system gives it page by page, as it is written.
"""

import math
import mmap
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class SlotRows:
    """What the next forward reads and writes: one row a sequence.

    slots: which slot each row is. starts: the position of its first new token.
    length: new tokens a row. key_length: the keys that are read, as many as the longest row has.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    length: int

    @property
    def key_length(self) -> int:
        return max(self.starts) + self.length

    def positions(self, device: torch.device) -> torch.Tensor:
        """int64 [rows, length]"""
        starts = torch.tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(self.length, device=device)


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values: [slots, heads, context_length, head size] each."""

    is_sliding = False  # a sliding window is a matter of the mask here

    def __init__(self, slots: int, context_length: int, like: tuple[torch.Tensor, torch.Tensor]):
        """like: keys and values of this layer from another cache, [rows, heads, tokens, size]."""
        super().__init__()
        self.keys, self.values = (
            _zeros((slots, t.shape[1], context_length, t.shape[3]), t) for t in like
        )
        self.is_initialized = True
        self.rows: SlotRows | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' states; return all that the rows may look at.

        key_states, value_states: [rows, heads, length, size]
        Returns keys and values: [rows, heads, key_length, size]. What lies beyond a row's own
        position is of no meaning, and masked.
        """
        rows = self.rows
        assert rows is not None, "a forward must be told its rows"
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if rows.length == 1:
                slots, starts = _indices(rows, store.device)
                store[slots, :, starts] = new[:, :, 0]
                continue
            for row, (slot, start) in enumerate(zip(rows.slots, rows.starts, strict=True)):
                store[slot, :, start : start + rows.length] = new[row]
        return self._read(self.keys, rows), self._read(self.values, rows)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            store[target, :, :length] = store[source, :, :length]

    def wipe_slot(self, slot: int) -> None:
        self.keys[slot].zero_()
        self.values[slot].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.rows.key_length if self.rows else query_length), 0

    def get_seq_length(self) -> int:
        return max(self.rows.starts) if self.rows else 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    @staticmethod
    def _read(store: torch.Tensor, rows: SlotRows) -> torch.Tensor:
        first, count = rows.slots[0], len(rows.slots)
        keys = store[:, :, : rows.key_length]
        if rows.slots == tuple(range(first, first + count)):
            return keys[first : first + count]  # neighbours: a view, no copy
        return keys[list(rows.slots)]


class SlotCache(Cache):  # type: ignore[misc]
    """A transformers cache in which every row has a length of its own.

    `select` says which rows the next forward is about; its `position_ids` and its mask (see
    `masks`) must be made for the same rows.
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

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for layer in self.layers:
            layer.copy_slot(source, target, length)

    def wipe_slot(self, slot: int) -> None:
        for layer in self.layers:
            layer.wipe_slot(slot)


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of the dtype and device of `like`.

    On the CPU the operating system is to make each page when it is first written: torch.zeros would
    write, and so occupy, all of it now. Small pages: a new token touches a place in every head of
    every layer, and huge pages would make 2 MB of each.
    """
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size())
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


@lru_cache(maxsize=8)  # one step asks for the same rows in every layer
def _indices(rows: SlotRows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows.slots, device=device), torch.tensor(rows.starts, device=device)


def bytes_per_token(filled: Cache) -> int:
    """What one position costs, over all layers, by the cache of one row that a model has filled."""
    return sum(
        t.shape[1] * t.shape[3] * t.element_size()
        for layer in filled.layers
        for t in (layer.keys, layer.values)
    )


def masks(rows: SlotRows, windows: dict[str, int | None], device: torch.device) -> object:
    """The attention mask of a forward: bool [rows, 1, length, key_length]; True may be looked at.

    windows: for each kind of layer, how many positions back it looks; None for all. One kind
    that is called "" gives the mask itself, others a dict by kind, as transformers takes them.
    """
    queries = rows.positions(device)[:, None, :, None]
    keys = torch.arange(rows.key_length, device=device)
    causal = keys <= queries
    made = {
        kind: causal if window is None else causal & (keys > queries - window)
        for kind, window in windows.items()
    }
    return made.get("", made)

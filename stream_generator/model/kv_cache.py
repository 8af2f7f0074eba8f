"""The slot cache: one row of keys and values for each request, all at different positions.

A slot holds `context_length` positions. A forward takes some slots, each from a position of its
own; the keys of a token stay where they were first written until the slot is given to another
request. Memory is reserved once; an operating system gives it page by page, as it is written.
"""

import math
import mmap
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """Rows of a forward whose slots are neighbours: they are read as one block.

    rows, slots: the same rows, counted in the forward and in the cache. key_length: the keys that
    are read, as many as the longest of them has. needs_mask: some of them must not see all of
    these.
    """

    rows: slice
    slots: slice
    key_length: int
    needs_mask: bool

    def view(self, store: torch.Tensor) -> torch.Tensor:
        """This run's part of keys or values: [rows of the run, heads, key_length, size]."""
        # store[self.slots, :, :self.key_length], in one operation where that takes three
        _, heads, _, size = store.shape
        strides = store.stride()
        start = store.storage_offset() + self.slots.start * strides[0]
        rows = self.slots.stop - self.slots.start
        return store.as_strided((rows, heads, self.key_length, size), strides, start)

    def of(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """This run's part of a forward's mask."""
        if mask is None or not self.needs_mask:
            return None
        return mask[self.rows, :, :, : self.key_length]


@dataclass(frozen=True)
class SlotRows:
    """What the next forward reads and writes: one row a request.

    slots: which slot each row is. starts: the position of its first new token.
    length: new tokens a row. windowed: some layers look only so far back.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    length: int
    windowed: bool = False

    @property
    def key_length(self) -> int:
        """The keys that are read, as many as the longest row has."""
        return max(self.starts) + self.length

    @cached_property
    def runs(self) -> list[Run]:
        """The rows in as few runs as there are; a run of several has one new token each."""
        runs: list[Run] = []
        first = 0
        for row in range(1, len(self.slots) + 1):
            if row < len(self.slots) and self.slots[row] == self.slots[row - 1] + 1:
                continue
            starts = self.starts[first:row]
            # Without a mask, attention is causal from the first key on, or sees all for one token.
            plain = len(set(starts)) == 1 and (self.length == 1 or starts[0] == 0)
            runs.append(
                Run(
                    slice(first, row),
                    slice(self.slots[first], self.slots[first] + row - first),
                    max(starts) + self.length,
                    needs_mask=self.windowed or not plain,
                )
            )
            first = row
        return runs

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
        key_heads, value_heads = (t.shape[1] for t in like)
        self._stores: tuple[torch.Tensor, ...]
        if like[0].shape[3] == like[1].shape[3]:  # one place for both, so that one write does it
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
        states = [key_states, value_states]
        if len(self._stores) == 1:
            states = [torch.cat(states, dim=1)]
        rows = self.write(*(s.transpose(1, 2) for s in states))
        return self._read(self.keys, rows), self._read(self.values, rows)

    def write(self, *states: torch.Tensor) -> SlotRows:
        """Write the new tokens' states into the rows' slots, and return the rows.

        states: [rows, length, key heads + value heads, size], or one for each where they differ in
        size.
        """
        rows = self.rows
        assert rows is not None, "a forward must be told its rows"
        for store, new in zip(self._stores, states, strict=True):
            if rows.length == 1:
                _, heads, context, size = store.shape
                places = _places(rows, heads, context, store.device)
                store.view(-1, size).index_copy_(0, places, new.reshape(-1, size))
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
            return rows.runs[0].view(store)  # neighbours: no copy
        return store[:, :, : rows.key_length][list(rows.slots)]


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

    def write(
        self, layer_index: int, states: torch.Tensor
    ) -> list[tuple[Run, torch.Tensor, torch.Tensor]]:
        """Write a layer's new states; all keys and values of each run of the rows.

        states: [rows, length, key heads + value heads, size]. Returned: views, [rows of the run,
        heads, key_length, size]. For attention of our own: `update` copies where rows lie apart.
        """
        layer = self.layers[layer_index]
        rows = layer.write(states)
        return [(run, run.view(layer.keys), run.view(layer.values)) for run in rows.runs]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for layer in self.layers:
            layer.copy_slot(source, target, length)

    def wipe_slot(self, slot: int) -> None:
        for layer in self.layers:
            layer.wipe_slot(slot)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Zeros for keys or values.

    On the CPU the operating system is to make each page when it is first written: torch.zeros would
    write, and so occupy, all of it now. Small pages: a new token touches a place in every head of
    every layer, and huge pages would make 2 MB of each.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@lru_cache(maxsize=8)  # one step asks for the same rows in every layer
def _places(rows: SlotRows, heads: int, context: int, device: torch.device) -> torch.Tensor:
    """Where in [slots * heads * context] the new tokens go: int64 [rows * heads]."""
    slots, starts = torch.tensor([rows.slots, rows.starts], device=device)
    by_head = slots[:, None] * heads + torch.arange(heads, device=device)
    return torch.flatten(by_head * context + starts[:, None])


def bytes_per_token(filled: Cache) -> int:
    """What one position costs, over all layers, by the cache of one row that a model has filled."""
    return sum(
        t.shape[1] * t.shape[3] * t.element_size()
        for layer in filled.layers
        for t in (layer.keys, layer.values)
    )


def describe_slots(slots: int, context_length: int, token_bytes: int) -> str:
    """How many requests of what length, and in how much memory, for a person."""
    return (
        f"up to {slots} requests at a time of up to {context_length} tokens each, "
        f"{slots * context_length * token_bytes / 1e9:.1f} GB for keys and values when all are full"
    )


def masks(
    rows: SlotRows, windows: dict[str, int | None], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The attention masks of a forward by kind of layer: 0, or -inf for keys that are not seen.

    windows: for each kind of layer, how many positions back it looks; None for all (see
    `attention_windows`). Each mask is [rows, 1, length, key_length], of `dtype`.
    """
    queries = rows.positions(device)[:, None, :, None]
    keys = torch.arange(rows.key_length, device=device)
    unseen = keys > queries
    made = {}
    for kind, window in windows.items():
        hidden = unseen if window is None else unseen | (keys <= queries - window)
        made[kind] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(
            hidden, -math.inf
        )
    return made

"""Assign slots to requests, and find prefixes of prompts that are computed already. No torch.

The keys and values of a finished request stay in its slot until another request gets the slot. A
new prompt reuses the longest prefix that it shares with any slot, even of a running request. There
are only a few dozen slots, so the search compares the prompt with every slot.
"""

import itertools
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from stream_generator.request import Request


@dataclass
class Slot:
    """One slot of the KV cache: its owner, and the ids whose keys and values the slot holds."""

    index: int
    owner: Request | None = None
    cached_ids: list[int] = field(default_factory=list)  # left by the last owner
    last_used: int = 0

    def ids(self, *, prompts_only: bool) -> Ids[int]:
        """Return the ids that are computed in this slot. prompts_only: leave out the reply."""
        if self.owner is None:
            return self.cached_ids
        ids = self.owner.prompt_ids if prompts_only else self.owner.all_ids
        return ids[: self.owner.num_computed_tokens]


@dataclass(frozen=True)
class SlotAssignment:
    """The slot of a request. Slot `source` already holds the keys and values of the first `length`
    ids of the request's prompt."""

    slot: int
    source: int
    length: int


class PrefixCache:
    """Assigns slots, the least recently used first, and finds the longest computed prefix."""

    def __init__(self, slots: int, *, smallest_chunk: int = 1, prompts_only: bool = False):
        """smallest_chunk: the least number of prompt ids that the runner computes at a time.
        prompts_only: reuse only keys and values that were computed as part of a prompt. Those
        computed during a reply may differ from them in the last bits."""
        self._smallest_chunk, self._prompts_only = smallest_chunk, prompts_only
        self._slots = [Slot(index) for index in range(slots)]
        self._clock = itertools.count(1)

    def assign(self, request: Request) -> SlotAssignment | None:
        """Assign a free slot to `request`. Return None if no slot is free.

        The last `smallest_chunk` ids of the prompt are always computed: the last id for its logits,
        and never fewer ids at a time.
        """
        free = [slot for slot in self._slots if slot.owner is None]
        if not free:
            return None
        source, length = self.longest(request)
        best = self._slots[source]
        if best.owner is None and length and length == len(best.cached_ids):
            slot = best  # the request continues all cached ids, so none of them are lost
        else:
            slot = min(free, key=lambda s: (s.last_used, s.index))
        slot.owner, slot.cached_ids, slot.last_used = request, [], next(self._clock)
        return SlotAssignment(slot.index, source, length)

    def longest(self, request: Request) -> tuple[int, int]:
        """Return the slot that holds the longest prefix of the prompt, and the prefix's length."""
        wanted = request.prompt_ids[: -self._smallest_chunk]
        lengths = {s.index: common_prefix(self._reusable(s), wanted) for s in self._slots}
        best = max(self._slots, key=lambda s: (lengths[s.index], s.owner is None, s.last_used))
        return best.index, lengths[best.index]

    def release(self, request: Request, *, keep: bool = True) -> None:
        """Release the slot of a request. keep: later prompts may reuse its keys and values."""
        for slot in self._slots:
            if slot.owner is request:
                slot.cached_ids = list(self._reusable(slot)) if keep else []
                slot.owner, slot.last_used = None, next(self._clock)

    def _reusable(self, slot: Slot) -> Ids[int]:
        ids = slot.ids(prompts_only=self._prompts_only)
        # A prompt below the smallest chunk was computed by the kernels of a decode.
        return ids if len(ids) >= self._smallest_chunk else []

    def clear(self) -> None:
        """Forget the prefixes of finished requests."""
        for slot in self._slots:
            slot.cached_ids = []

    @property
    def free(self) -> int:
        return sum(slot.owner is None for slot in self._slots)


def common_prefix(a: Ids[int], b: Ids[int]) -> int:
    """Return the length of the common prefix of `a` and `b`.

    Bisects on slices, because Python compares slices at the speed of C.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""Which slot a request gets, and how much of its prompt is computed there already. No torch.

What a request has computed stays in its slot after it ends, until another one needs the slot. A
new prompt that begins like one of these, or like one that still runs, starts from its keys and
values. With a few dozen slots a comparison with each is all it takes.
"""

import itertools
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from stream_generator.request import Request


@dataclass
class Slot:
    """One row of the cache: the ids whose keys and values it holds, and who writes into it."""

    index: int
    owner: Request | None = None
    cached_ids: list[int] = field(default_factory=list)  # of the last owner
    last_used: int = 0

    def ids(self, *, prompts_only: bool) -> Ids[int]:
        """The ids that are computed in this slot. prompts_only: up to the end of the prompt."""
        if self.owner is None:
            return self.cached_ids
        ids = self.owner.prompt_ids if prompts_only else self.owner.all_ids
        return ids[: self.owner.num_computed_tokens]


@dataclass(frozen=True)
class SlotAssignment:
    """Slot `slot` for a request; `length` of its prompt ids are in slot `source` already."""

    slot: int
    source: int
    length: int


class PrefixCache:
    """Gives out slots, the least recently used first, and finds the longest computed prefix."""

    def __init__(self, slots: int, *, smallest_chunk: int = 1, prompts_only: bool = False):
        """smallest_chunk: ids that are computed together, at least. prompts_only: reuse nothing
        that was computed as a reply, whose last bits may differ."""
        self._smallest_chunk, self._prompts_only = smallest_chunk, prompts_only
        self._slots = [Slot(index) for index in range(slots)]
        self._clock = itertools.count(1)

    def assign(self, request: Request) -> SlotAssignment | None:
        """A free slot for `request`, which owns it from now on; None if there is none.

        At least a chunk with the prompt's last id is left: its logits give the first new id.
        """
        free = [slot for slot in self._slots if slot.owner is None]
        if not free:
            return None
        source, length = self.longest(request)
        best = self._slots[source]
        if best.owner is None and length and length == len(best.cached_ids):
            slot = best  # it only goes on: nothing is lost by taking it over
        else:
            slot = min(free, key=lambda s: (s.last_used, s.index))
        slot.owner, slot.cached_ids, slot.last_used = request, [], next(self._clock)
        return SlotAssignment(slot.index, source, length)

    def longest(self, request: Request) -> tuple[int, int]:
        """The slot that has computed most of the prompt's beginning, and how many ids that is."""
        wanted = request.prompt_ids[: -self._smallest_chunk]
        lengths = {s.index: common_prefix(self._reusable(s), wanted) for s in self._slots}
        best = max(self._slots, key=lambda s: (lengths[s.index], s.owner is None, s.last_used))
        return best.index, lengths[best.index]

    def release(self, request: Request, *, keep: bool = True) -> None:
        """Take the slot back; what it holds stays there for others, unless it can't be trusted."""
        for slot in self._slots:
            if slot.owner is request:
                slot.cached_ids = list(self._reusable(slot)) if keep else []
                slot.owner, slot.last_used = None, next(self._clock)

    def _reusable(self, slot: Slot) -> Ids[int]:
        ids = slot.ids(prompts_only=self._prompts_only)
        # A prompt below the smallest chunk was computed as a reply is.
        return ids if len(ids) >= self._smallest_chunk else []

    def clear(self) -> None:
        """Forget what ended requests have left."""
        for slot in self._slots:
            slot.cached_ids = []

    @property
    def free(self) -> int:
        return sum(slot.owner is None for slot in self._slots)


def common_prefix(a: Ids[int], b: Ids[int]) -> int:
    """How many ids `a` and `b` begin with in common.

    By bisection on slices, which Python compares at the speed of C.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

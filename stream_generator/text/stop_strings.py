"""Cut text before a stop string, so that no part of the stop string is delivered."""

from collections.abc import Iterable


class StopStrings:
    """Cuts a stream of deltas before the stop string that is complete first.

    Text that may begin a stop string is held back until later text decides. The result does not
    depend on how the text is split into deltas.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, delta: str) -> tuple[str, bool]:
        """Add the next delta. Returns the text to deliver, and whether a stop string was found."""
        if not self._stops:
            return delta, False
        text = self._held + delta
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, start = min(ends)  # the stop string that ends first; if two do, the longer one
            self._held = ""
            return text[:start], True
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text held back, when no more text follows to complete a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

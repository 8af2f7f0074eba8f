"""Stop strings that never leak, not even their beginning."""

from collections.abc import Iterable


class StopStrings:
    """Cuts a stream of deltas before the first stop string that is completed in it.

    Text that may be the beginning of a stop string is held back until that is decided. What
    comes out does not depend on how the text is split into deltas.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, delta: str) -> tuple[str, bool]:
        """Take the next delta; return the text that may be shown, and whether a stop was found."""
        if not self._stops:
            return delta, False
        text = self._held + delta
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, start = min(ends)  # completed first; of those, the longest
            self._held = ""
            return text[:start], True
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """At the end of the text: what was held back turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

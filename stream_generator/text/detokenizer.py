"""Ids to text deltas, one id at a time. The cost of an id does not grow with the reply."""

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"

# A UTF-8 character has at most four bytes, so an incomplete one shows as at most three replacement
# characters (one in a byte-level decoder, one per byte in a byte-fallback decoder).
MAX_INCOMPLETE = 3

MIN_WINDOW = 8  # ids that stay in the window: more than an incomplete character can have
MAX_WINDOW = 24  # ids in the window; at this length the oldest ids are removed
MAX_REWRITTEN_WINDOW = 64  # ids in the window at which rewritten text is delivered after all

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# The byte of each character of byte-level vocabularies.
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}


class Detokenizer:
    """Turns ids into text deltas: `decode(id)` for each id, then `flush()` once.

    Joined, the deltas equal `tokenizer.decode` of all ids without special tokens, in any script,
    however the bytes of a character are split over ids. Up to three replacement characters at the
    end are held back, because the next id may complete them. A literal U+FFFD therefore arrives
    one to three ids late.

    Each call decodes only a window of recent ids. (`tokenizers.DecodeStream` holds back all text as
    long as the text ends in U+FFFD. Its cost grows with the square of the number of consecutive
    invalid bytes, and it never delivers an incomplete character at the end.)

    In one case the joined deltas differ from `tokenizer.decode`: a byte-fallback decoder (Llama 2)
    rewrites a whole run of bytes when one byte turns out to be invalid. Text that was delivered
    before stays.

    Invariant: `_sent` is the delivered part of the window's text.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._hidden = special_ids(tokenizer)
        self._window: list[int] = []
        self._sent = ""

    def decode(self, token_id: int) -> str:
        """Add the next id. Returns the text that later ids cannot change; it may be empty."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._text(self._window)
        if not text.startswith(self._sent) and len(self._window) < MAX_REWRITTEN_WINDOW:
            return ""  # a byte-fallback decoder, in the middle of a character
        certain = max(len(text) - _uncertain(text), len(self._sent))
        delta, held = text[len(self._sent) : certain], text[certain:]
        self._sent = text[:certain]
        if len(self._window) >= MAX_WINDOW:
            self._slide(text, held)
        return delta

    def flush(self) -> str:
        """Return the text held back, incomplete characters as U+FFFD, and start a new reply."""
        tail = self._text(self._window)[len(self._sent) :]
        self._window, self._sent = [], ""
        return tail

    def _slide(self, text: str, held: str) -> None:
        """Remove the oldest ids, if the remaining ids decode to the end of the same text.

        They do not if the first begins inside a character. Of any four ids, one does not.
        """
        for keep in range(MIN_WINDOW, MIN_WINDOW + 4):
            shorter = self._text(self._window[-keep:])
            if text.endswith(shorter) and len(shorter) >= len(held):
                self._window = self._window[-keep:]
                self._sent = shorter[: len(shorter) - len(held)]
                return

    def _text(self, ids: list[int]) -> str:
        # The tokenizer's clean-up of spaces would also remove spaces in code and lists.
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that `decode(skip_special_tokens=True)` leaves out."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _uncertain(text: str) -> int:
    """The number of characters at the end of `text` that the next id may still replace."""
    stripped = text.rstrip(REPLACEMENT)
    return min(len(text) - len(stripped), MAX_INCOMPLETE)


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of an id, even if they are only part of a character."""
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if token_id in tokenizer.added_tokens_decoder:
        return name.encode()
    if BYTE_TOKEN.fullmatch(name):  # a byte-fallback vocabulary
        return bytes([int(name[3:5], 16)])
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if REPLACEMENT in text and all(char in BYTE_OF for char in name):
        return bytes(BYTE_OF[char] for char in name)
    if name.startswith("▁") and not text.startswith(" "):  # `decode` drops a leading space
        text = " " + text
    return text.encode()

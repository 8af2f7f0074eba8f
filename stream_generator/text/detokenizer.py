"""Ids to text deltas, one id at a time, at a cost that does not grow with the reply."""

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\ufffd"

# A UTF-8 character has at most four bytes, so an incomplete one shows as at most three
# replacement characters (one in a byte-level decoder, one a byte in a byte-fallback decoder).
MAX_INCOMPLETE = 3

KEEP = 8  # ids of context that stay in the window: more than an incomplete character can span
SLIDE_AT = 24  # ids in the window at which it is cut back
GIVE_UP_AT = 64  # ids after which a rewritten run of bytes is delivered as it stands

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

# What byte a character stands for in byte-level vocabularies.
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}


class Detokenizer:
    """Turns ids into text deltas: `decode(id)` for each id, then `flush()` once.

    Joined, the deltas equal `tokenizer.decode` of all ids without its special tokens, whatever
    the script, and however the bytes of a character are split over ids. Text that may still
    change is held back: at most three replacement characters at the end, since the next id may
    complete them; so a literal U+FFFD arrives one to three ids late, but arrives.

    Only a window of recent ids is decoded each time. (`tokenizers.DecodeStream` holds back
    everything while the text ends in U+FFFD, so its cost grows with the square of a run of
    invalid bytes, and it cannot deliver an incomplete end.)

    A byte-fallback decoder (Llama 2) rewrites a whole run of bytes when one of them turns out
    invalid; there the text already sent stays as it was.

    Invariant: `_sent` is what has been delivered of the window's text.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._hidden = special_ids(tokenizer)
        self._window: list[int] = []
        self._sent = ""

    def decode(self, token_id: int) -> str:
        """Take the next id; return the text that is certain now (perhaps none)."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._text(self._window)
        if not text.startswith(self._sent) and len(self._window) < GIVE_UP_AT:
            return ""  # a byte-fallback decoder, in the middle of a character
        certain = max(len(text) - _uncertain(text), len(self._sent))
        delta, held = text[len(self._sent) : certain], text[certain:]
        self._sent = text[:certain]
        if len(self._window) >= SLIDE_AT:
            self._slide(text, held)
        return delta

    def flush(self) -> str:
        """Return what was held back, an incomplete character as U+FFFD, and start afresh."""
        tail = self._text(self._window)[len(self._sent) :]
        self._window, self._sent = [], ""
        return tail

    def _slide(self, text: str, held: str) -> None:
        """Forget the oldest ids, where the rest still decodes to the end of the same text.

        A start inside a character fails that test; of four neighbouring starts one is not.
        """
        for keep in range(KEEP, KEEP + 4):
            shorter = self._text(self._window[-keep:])
            if text.endswith(shorter) and len(shorter) >= len(held):
                self._window = self._window[-keep:]
                self._sent = shorter[: len(shorter) - len(held)]
                return

    def _text(self, ids: list[int]) -> str:
        # The tokenizer's own clean-up of spaces would also eat those of code and of lists.
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that `decode(skip_special_tokens=True)` leaves out."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _uncertain(text: str) -> int:
    """How many characters at the end of `text` the next id may still replace."""
    stripped = text.rstrip(REPLACEMENT)
    return min(len(text) - len(stripped), MAX_INCOMPLETE)


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes that an id stands for, also where they are a part of a character only."""
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if token_id in tokenizer.added_tokens_decoder:
        return name.encode()
    if BYTE_TOKEN.fullmatch(name):  # of a byte-fallback vocabulary
        return bytes([int(name[3:5], 16)])
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if REPLACEMENT in text and all(char in BYTE_OF for char in name):
        return bytes(BYTE_OF[char] for char in name)
    if name.startswith("▁") and not text.startswith(" "):  # eaten at the beginning of a text
        text = " " + text
    return text.encode()

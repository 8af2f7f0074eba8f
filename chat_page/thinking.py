"""What a model thinks before it answers, apart from the answer."""

import re
from typing import NamedTuple

# As DeepSeek, Qwen and their kin write it; others; Mistral's.
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)


class Parts(NamedTuple):
    """A reply in two. is_open: the thinking has not ended (yet)."""

    thought: str
    answer: str
    is_open: bool = False


def split_thinking(text: str) -> Parts:
    """Part the thinking at the beginning of a reply from the answer after it.

    Where the prompt itself has opened the thinking, the reply has its end alone, on a line of its
    own. A tag anywhere else is a part of the answer.
    """
    begun = text.lstrip()
    for opening, closing in TAGS:
        if begun.startswith(opening):
            thought, found, answer = begun[len(opening) :].partition(closing)
            return Parts(thought.strip(), answer.lstrip(), not found)
        ends = re.search(rf"^{re.escape(closing)}[ \t]*$", text, re.MULTILINE)
        if ends and opening not in text:
            return Parts(text[: ends.start()].strip(), text[ends.end() :].lstrip())
    return Parts("", text)

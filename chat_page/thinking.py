"""Separates a model's thinking from its answer."""

import re
from typing import NamedTuple

# The first is DeepSeek's and Qwen's, the last is Mistral's; other models use the rest.
TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)


class Parts(NamedTuple):
    """The parts of a reply. is_open: the thinking has no end yet."""

    thought: str
    answer: str
    is_open: bool = False


def split_thinking(text: str) -> Parts:
    """Split a reply into the thinking at its beginning and the answer.

    If the prompt contains the opening tag, the reply has only a closing tag, on a line of its own.
    A tag anywhere else is part of the answer.
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

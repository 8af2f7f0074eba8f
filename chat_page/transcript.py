"""A conversation as the messages that Gradio's Chatbot shows."""

from collections.abc import Iterable
from html import escape
from typing import Any

from chat_page.conversation import Conversation, Turn
from chat_page.markup import marked
from chat_page.meter import meter
from chat_page.reply import Progress
from chat_page.thinking import split_thinking
from chat_page.words import Words

ChatbotMessage = dict[str, Any]


def transcript(conversation: Conversation, words: Words) -> list[ChatbotMessage]:
    """All messages. A reply shows its thinking, its answer, its problem and its figures.

    If the last reply is missing or ended early, the last message offers buttons to go on.
    """
    messages = finished(conversation.turns, words)
    if conversation.turns and (options := _options(conversation.turns[-1], words)):
        if conversation.turns[-1].role == "user":  # Gradio shows no buttons below user messages
            messages.append(_notice(words("no_reply")))
        messages[-1]["options"] = options
    return messages


def finished(turns: Iterable[Turn], words: Words) -> list[ChatbotMessage]:
    """The messages of finished turns."""
    return [message for turn in turns for message in _shown(turn, words)]


def in_progress(progress: Progress, words: Words) -> list[ChatbotMessage]:
    """The messages of a reply that is being written."""
    return _shown(progress.turn, words, progress)


def turn_at(conversation: Conversation, index: int, words: Words) -> int:
    """The index of the turn that message `index` belongs to. Raises `IndexError`."""
    end = 0
    for number, turn in enumerate(conversation.turns):
        end += len(_shown(turn, words))
        if index < end:
            return number
    raise IndexError(index)


def _shown(turn: Turn, words: Words, writing: Progress | None = None) -> list[ChatbotMessage]:
    if turn.role == "user":
        return [_message("user", marked(turn.content))]
    messages = []
    thought, answer, is_open = split_thinking(turn.content)
    if thought:
        is_thinking = is_open and writing is not None
        message = _message("assistant", marked(thought))
        message["metadata"] = {
            "title": words("thinking" if is_thinking else "thought"),
            "status": "pending" if is_thinking else "done",
        }
        messages.append(message)
    if answer:
        messages.append(_message("assistant", marked(answer)))
    if turn.problem:
        messages.append(_notice(turn.problem))
    figures = turn.figures
    if writing is not None and figures is not None:
        messages.append(_message("assistant", meter(figures, words, writing.position)))
    elif figures is not None and (figures.prompt_tokens or figures.finish_reason):
        messages.append(_message("assistant", meter(figures, words)))
    return messages


def _options(turn: Turn, words: Words) -> list[dict[str, str]]:
    options = ["go_on"] if turn.can_go_on else []
    if turn.role == "user" or turn.problem:
        options.append("again")
    return [{"label": words(option), "value": option} for option in options]


def _notice(text: str) -> ChatbotMessage:
    # On one line: an empty line would end the HTML, and the rest would be read as Markdown.
    return _message("assistant", f'<div class="notice">{escape(" ".join(text.split()))}</div>')


def _message(role: str, text: str) -> ChatbotMessage:
    # As a content part, because Gradio strips the indentation of a plain string.
    return {"role": role, "content": [{"type": "text", "text": text}]}

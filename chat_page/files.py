"""Conversations as files: out as Markdown or JSON, in as JSON."""

import re
import uuid

from pydantic import ValidationError

from chat_page.conversation import Conversation

MAX_FILE_CHARACTERS = 4_000_000


class NotAConversation(ValueError):
    """The file is not one that this page has saved."""


def to_json(conversation: Conversation) -> str:
    return conversation.model_dump_json(indent=2) + "\n"


def from_json(text: str) -> Conversation:
    """The conversation of a saved file, under a new id, so that it replaces none.

    Raises `NotAConversation`.
    """
    if len(text) > MAX_FILE_CHARACTERS:
        raise NotAConversation("the file is too large")
    try:
        conversation = Conversation.model_validate_json(text)
    except ValidationError as error:
        raise NotAConversation(str(error)) from error
    if not conversation.turns:
        raise NotAConversation("the file holds no message")
    return conversation.model_copy(update={"id": uuid.uuid4().hex})


def to_markdown(conversation: Conversation) -> str:
    """For people: the texts as they are, under a heading for each turn."""
    parts = [f"# {conversation.name}"]
    if conversation.settings.system_prompt.strip():
        parts += ["## System", conversation.settings.system_prompt]
    for turn in conversation.turns:
        if turn.content:
            parts += ["## User" if turn.role == "user" else "## Assistant", turn.content]
    return "\n\n".join(parts) + "\n"


def file_name(conversation: Conversation, ending: str) -> str:
    """The conversation's name, as far as every system takes it for a file's."""
    name = re.sub(r"[^\w.-]+", "-", conversation.name).strip("-.")
    return f"{name or 'conversation'}.{ending}"

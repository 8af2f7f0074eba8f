"""Export conversations as Markdown or JSON, and import them from JSON."""

import re
import uuid

from pydantic import ValidationError

from chat_page.conversation import Conversation

MAX_FILE_CHARACTERS = 4_000_000


class NotAConversation(ValueError):
    """The file is not a conversation that this page exported."""


def to_json(conversation: Conversation) -> str:
    return conversation.model_dump_json(indent=2) + "\n"


def from_json(text: str) -> Conversation:
    """Read an exported conversation. A new id keeps it from replacing a stored conversation.

    Raises `NotAConversation`.
    """
    if len(text) > MAX_FILE_CHARACTERS:
        raise NotAConversation(f"the file has over {MAX_FILE_CHARACTERS} characters")
    try:
        conversation = Conversation.model_validate_json(text)
    except ValidationError as error:
        raise NotAConversation(str(error)) from error
    if not conversation.turns:
        raise NotAConversation("the file has no messages")
    return conversation.model_copy(update={"id": uuid.uuid4().hex})


def to_markdown(conversation: Conversation) -> str:
    """The unchanged texts, with a heading for each turn."""
    parts = [f"# {conversation.name}"]
    if conversation.settings.system_prompt.strip():
        parts += ["## System", conversation.settings.system_prompt]
    for turn in conversation.turns:
        if turn.content:
            parts += ["## User" if turn.role == "user" else "## Assistant", turn.content]
    return "\n\n".join(parts) + "\n"


def file_name(conversation: Conversation, ending: str) -> str:
    """The conversation's name as a file name that is valid on every system."""
    name = re.sub(r"[^\w.-]+", "-", conversation.name).strip("-.")
    return f"{name or 'conversation'}.{ending}"

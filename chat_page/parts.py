"""The components that Gradio has not: the list of conversations, the token view, a download.

Each is a `gr.HTML` with a script of its own, in `assets/`. The scripts set text, never HTML.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from chat_page.files import MAX_FILE_CHARACTERS
from chat_page.words import texts

ASSETS = Path(__file__).parent / "assets"

# What the events below bring along: the value of an input, fetched in the browser.
CHOSEN = "() => [window.conversations.chosen]"
BROUGHT = "() => [window.conversations.brought]"
OPENED = "() => [window.conversations.opened()]"


def conversation_shelf() -> gr.HTML:
    """The visitor's conversations, in their browser's storage. Its value is the one that is open.

    Events: `choose`, with `CHOSEN`; `bring`, a file's text with `BROUGHT`; `fresh`, when the open
    conversation was deleted. When the page is loaded, `OPENED` is what it showed before.
    """
    words = texts(
        "conversations", "none_yet", "delete", "delete_sure", "import", "kept_where",
        "storage_full", "file_too_large",
    )  # fmt: skip
    return _scripted("shelf", words=words, most=MAX_FILE_CHARACTERS)


def token_view() -> gr.HTML:
    """A reply's tokens, tinted by their probability. Event: `take`, with `token` and `choice`."""
    return _scripted("tokens", words=texts("tokens_hint", "tokens_none", "token_view"))


def download() -> gr.HTML:
    """Saves its value, `{"name", "text"}`, as a file of the visitor's; no server keeps it."""
    return _scripted("download")


def _scripted(name: str, **props: Any) -> gr.HTML:
    """An empty element, and the script that fills it."""
    script = (ASSETS / f"{name}.js").read_text()
    return gr.HTML(html_template=f'<div class="{name}"></div>', js_on_load=script, **props)

"""The components that Gradio has not: the list of conversations, the token view, a download.

Each is a `gr.HTML` with a script of its own, in `assets/`. The scripts set text, never HTML.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from chat_page.files import MAX_FILE_CHARACTERS
from chat_page.words import texts

ASSETS = Path(__file__).parent / "assets"

# What the page's events do in the browser first: they enter the lane, one at a time, and bring the
# conversation as it is then (the first of their inputs) or the one that is to be opened.
ENTER = "async (seen, ...others) => [await window.lane.enter(seen), ...others]"
ENTER_PATIENTLY = "async (seen, ...others) => [await window.lane.enter(seen, false), ...others]"
# A message has left the box, and waits outside of it for its turn.
SEND = """async (seen, _, ...others) => {
    const message = window.box.take();
    return [await window.lane.enter(seen), message, ...others];
}"""
OPENED = "async () => { await window.lane.first(); return [window.conversations.opened()]; }"
NEW, CHOSEN, BROUGHT, DELETED = (
    f"async () => {{ await window.lane.enter(); return [window.conversations.{what}()]; }}"
    for what in ("none", "chosen", "brought", "deleted")
)
SHOWN = "() => [window.conversations.current]"


def lane() -> gr.HTML:
    """Keeps the page's events apart. Its value is the id of the reply that is being written.

    Event: `stop`, when something waits for that reply to end.
    """
    return _scripted("lane", visible="hidden")


def conversation_shelf() -> gr.HTML:
    """The visitor's conversations, in their browser's storage. Its value is the one that is open.

    set: settings that have changed, and the id of their conversation. Events: `choose`, with
    `CHOSEN`; `bring`, a file's text with `BROUGHT`; `fresh`, when the open conversation is to be
    deleted, with `DELETED`. When the page is loaded, `OPENED` is what it showed before.
    """
    words = texts(
        "conversations", "none_yet", "delete", "delete_sure", "import", "kept_where",
        "storage_full", "file_too_large",
    )  # fmt: skip
    return _scripted("shelf", words=words, most=MAX_FILE_CHARACTERS, set=None)


def token_view() -> gr.HTML:
    """A reply's tokens, tinted by their probability. Event: `take`, with `token` and `choice`."""
    return _scripted("tokens", words=texts("tokens_hint", "tokens_none", "token_view"))


def download() -> gr.HTML:
    """Saves its value, `{"name", "text"}`, as a file of the visitor's; no server keeps it."""
    return _scripted("download", visible="hidden")


def _scripted(name: str, **props: Any) -> gr.HTML:
    """An empty element, and the script that fills it."""
    script = (ASSETS / f"{name}.js").read_text()
    return gr.HTML(html_template=f'<div class="{name}"></div>', js_on_load=script, **props)

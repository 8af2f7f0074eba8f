"""Components that Gradio lacks: the event queue, the conversation list, the token view, a download.

Each is a `gr.HTML` with a script of its own in `assets/`. The scripts set text, never HTML.
"""

from pathlib import Path
from typing import Any

import gradio as gr

from chat_page.files import MAX_FILE_CHARACTERS
from chat_page.words import texts

ASSETS = Path(__file__).parent / "assets"

# Scripts that the browser runs before an event of the page. A script waits in the event queue, then
# sets the event's first input: the conversation as it is now, or the conversation to open.
ENTER = "async (seen, ...others) => [await window.eventQueue.enter(seen), ...others]"
ENTER_WITHOUT_STOPPING = (
    "async (seen, ...others) => [await window.eventQueue.enter(seen, false), ...others]"
)
# Takes the message out of the box before waiting.
SEND = """async (seen, _, ...others) => {
    const message = window.box.take();
    return [await window.eventQueue.enter(seen), message, ...others];
}"""
OPENED = "async () => { await window.eventQueue.open(); return [window.conversations.opened()]; }"
NEW, CHOSEN, IMPORTED, DELETED = (
    f"async () => {{ await window.eventQueue.enter(); return [window.conversations.{what}()]; }}"
    for what in ("none", "chosen", "imported", "deleted")
)
SHOWN = "() => [window.conversations.current]"


def event_queue() -> gr.HTML:
    """Lets events run one at a time. Its value is the id of the reply that is being written.

    Event: `stop`, when a waiting event needs this reply to end.
    """
    return _scripted("event_queue.js", "event-queue", visible="hidden")


def conversation_list() -> gr.HTML:
    """The conversations in the browser's storage. Its value is the open conversation.

    Its property `changed_settings` takes new settings and the id of their conversation. Before each
    of its events, the browser runs a script of this module that returns the event's input: `CHOSEN`
    for `choose`, `IMPORTED` (the text of a file) for `import_file`, `DELETED` for `delete_open`.
    """
    words = texts(
        "conversations", "none_yet", "delete", "delete_sure", "import", "kept_where",
        "storage_full", "file_too_large",
    )  # fmt: skip
    return _scripted(
        "conversation_list.js", "conversation-list", words=words, max_size=MAX_FILE_CHARACTERS,
        changed_settings=None,
    )  # fmt: skip


def token_view() -> gr.HTML:
    """A reply's tokens, coloured by probability. Event: `choose`, with `token` and `choice`."""
    return _scripted("tokens.js", "tokens", words=texts("tokens_hint", "tokens_none", "token_view"))


def download() -> gr.HTML:
    """Saves its value, `{"name", "text"}`, as a file in the browser; the server keeps no copy."""
    return _scripted("download.js", "download", visible="hidden")


def _scripted(script: str, css_class: str, **props: Any) -> gr.HTML:
    """An empty element, and the script that fills it."""
    source = (ASSETS / script).read_text()
    return gr.HTML(html_template=f'<div class="{css_class}"></div>', js_on_load=source, **props)

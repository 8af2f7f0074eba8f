"""Connects the components of the page with its events."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from chat_page import events, parts
from chat_page.events import Events
from chat_page.layout import Layout
from chat_page.reply import REPLIES_AT_ONCE
from stream_service.client import StreamClient

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, **QUIET}
# Otherwise Gradio drops an event that arrives while an earlier event of its kind runs.
EVERY: dict[str, Any] = {"trigger_mode": "multiple"}


class Page:
    """The chat page of one service. Gradio launches `blocks`."""

    def __init__(self, client: StreamClient) -> None:
        self.layout = Layout()
        self.events = Events(client, self.layout)
        self.blocks = self.layout.blocks
        layout = self.layout
        self._opening: dict[str, Any] = {
            "inputs": layout.conversation_list,
            "outputs": [
                layout.conversation_list, layout.chat, layout.status, layout.service,
                layout.event_queue, layout.tokens, layout.token_view, layout.box,
                *layout.controls.shown,
            ],
            **EVERY,
            **QUIET,
        }  # fmt: skip
        with self.blocks:
            for event in (
                *self._open_conversations(),
                *self._write_replies(),
                *self._keep_settings(),
            ):
                self._leave_queue_after(event)
            self._stop_replies()
            self._show_tokens()
            self._save_files()
        self.blocks.queue(max_size=4 * REPLIES_AT_ONCE, default_concurrency_limit=None)

    def _open_conversations(self) -> list[Any]:
        layout, do, opening = self.layout, self.events, self._opening
        conversations = layout.conversation_list
        return [
            self.blocks.load(do.show, js=parts.OPENED, **opening),
            conversations.choose(do.show, js=parts.CHOSEN, **opening),
            conversations.import_file(do.show_file, js=parts.IMPORTED, **opening),
            conversations.delete_open(do.show, js=parts.DELETED, **opening),
            layout.new.click(do.show, js=parts.NEW, **opening),
        ]

    def _write_replies(self) -> list[Any]:
        layout, do = self.layout, self.events
        opened = layout.conversation_list
        shown = [opened, layout.chat, layout.tokens, layout.token_view, layout.box]
        writing: dict[str, Any] = {
            "outputs": [
                *shown, layout.event_queue, layout.status, layout.service, *layout.controls.shown
            ],
            "concurrency_limit": None,  # `Replies` limits replies itself
            **QUIET,
        }  # fmt: skip
        entering = {"js": parts.ENTER, **writing}
        given = [opened, layout.service, layout.with_tokens]
        sent = [opened, layout.box, layout.service, layout.with_tokens]
        chosen = [opened, layout.service, layout.tokens]
        return [
            layout.box.submit(do.send, sent, js=parts.SEND, **EVERY, **writing),
            layout.chat.retry(do.retry, given, **entering),
            layout.chat.edit(do.edit, given, **entering),
            layout.chat.option_select(do.go_on, given, **entering),
            layout.token_view.choose(do.choose_token, chosen, **entering),
            layout.chat.undo(do.undo, opened, shown, js=parts.ENTER, **AT_ONCE),
        ]

    def _keep_settings(self) -> list[Any]:
        layout, controls = self.layout, self.layout.controls
        fields = list(controls.fields.values())
        keeping: dict[str, Any] = {
            "fn": events.keep_settings,
            "inputs": [layout.conversation_list, layout.service, *fields],
            "outputs": layout.conversation_list,
            "js": parts.ENTER_WITHOUT_STOPPING,
            **EVERY,
            **AT_ONCE,
        }
        preset = controls.preset.input(
            events.fill_prompt, controls.preset, controls.system_prompt, **AT_ONCE
        )
        reset = controls.reset.click(
            self.events.reset_settings,
            [layout.service, controls.system_prompt],
            controls.shown,
            **AT_ONCE,
        )
        settled = [f.release if isinstance(f, gr.Slider) else f.blur for f in fields]
        return [gr.on(settled, **keeping), preset.then(**keeping), reset.then(**keeping)]

    def _leave_queue_after(self, event: Any) -> None:
        """Let the next event start when this one has ended, even if it failed."""
        _leave_queue(event.then)
        recovered = event.failure(self.events.recover, js=parts.SHOWN, **self._opening)
        _leave_queue(recovered.then)
        _leave_queue(recovered.failure)

    def _stop_replies(self) -> None:
        layout, stop = self.layout, self.events.replies.stop
        layout.box.stop(stop, layout.event_queue, None, **AT_ONCE)
        layout.event_queue.stop(stop, layout.event_queue, None, **AT_ONCE)

    def _show_tokens(self) -> None:
        self.layout.with_tokens.input(
            lambda on: gr.update(visible=on or "hidden"),
            self.layout.with_tokens,
            self.layout.token_panel,
            **AT_ONCE,
        )

    def _save_files(self) -> None:
        layout = self.layout
        for button, ending in ((layout.as_markdown, "md"), (layout.as_json, "json")):
            button.click(
                _download_as(ending),
                layout.conversation_list,
                layout.saved_file,
                js=parts.SHOWN,
                **AT_ONCE,
            )


def _download_as(ending: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: events.download(value, ending)


def _leave_queue(after: Any) -> None:
    """Let the next event start. after: the `then` or the `failure` of an event."""
    after(None, None, None, js="() => window.eventQueue.leave()", api_visibility="private")

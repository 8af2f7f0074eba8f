"""The page: its layout, and which event calls what."""

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
# Gradio would drop an event that comes while the last one of its kind still runs.
EVERY: dict[str, Any] = {"trigger_mode": "multiple"}


class Page:
    """The chat page of one service. `blocks` is what Gradio launches."""

    def __init__(self, client: StreamClient) -> None:
        self.layout = Layout()
        self.events = Events(client, self.layout)
        self.blocks = self.layout.blocks
        shelf, controls = self.layout.shelf, self.layout.controls
        self._opening: dict[str, Any] = {
            "inputs": shelf,
            "outputs": [
                shelf, self.layout.chat, self.layout.status, self.layout.service,
                self.layout.lane, self.layout.tokens, self.layout.token_view, self.layout.box,
                *controls.shown,
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
                self._leave_lane_after(event)
            self._stop_replies()
            self._show_tokens()
            self._save_files()
        self.blocks.queue(max_size=4 * REPLIES_AT_ONCE, default_concurrency_limit=None)

    def _open_conversations(self) -> list[Any]:
        layout, show, opening = self.layout, self.events.show, self._opening
        return [
            self.blocks.load(show, js=parts.OPENED, **opening),
            layout.shelf.choose(show, js=parts.CHOSEN, **opening),
            layout.shelf.bring(self.events.show_file, js=parts.BROUGHT, **opening),
            layout.shelf.fresh(show, js=parts.DELETED, **opening),
            layout.new.click(show, js=parts.NEW, **opening),
        ]

    def _write_replies(self) -> list[Any]:
        layout, do = self.layout, self.events
        shown = [layout.shelf, layout.chat, layout.tokens, layout.token_view, layout.box]
        writing: dict[str, Any] = {
            "outputs": [
                *shown, layout.lane, layout.status, layout.service, *layout.controls.shown
            ],
            "concurrency_limit": None,  # `Replies` has one
            **QUIET,
        }  # fmt: skip
        entering = {"js": parts.ENTER, **writing}
        given = [layout.shelf, layout.service, layout.with_tokens]
        sent = [layout.shelf, layout.box, layout.service, layout.with_tokens]
        chosen = [layout.shelf, layout.service, layout.tokens]
        return [
            layout.box.submit(do.send, sent, js=parts.SEND, **EVERY, **writing),
            layout.chat.retry(do.retry, given, **entering),
            layout.chat.edit(do.edit, given, **entering),
            layout.chat.option_select(do.go_on, given, **entering),
            layout.token_view.take(do.choose_token, chosen, **entering),
            layout.chat.undo(do.undo, layout.shelf, shown, js=parts.ENTER, **AT_ONCE),
        ]

    def _keep_settings(self) -> list[Any]:
        layout, controls = self.layout, self.layout.controls
        fields = list(controls.fields.values())
        keeping: dict[str, Any] = {
            "fn": events.keep_settings,
            "inputs": [layout.shelf, layout.service, *fields],
            "outputs": layout.shelf,
            "js": parts.ENTER_PATIENTLY,
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

    def _leave_lane_after(self, event: Any) -> None:
        """Let the next event start after this one, also when this one failed."""
        _leave_lane(event.then)
        recovered = event.failure(self.events.recover, js=parts.SHOWN, **self._opening)
        _leave_lane(recovered.then)
        _leave_lane(recovered.failure)

    def _stop_replies(self) -> None:
        layout, stop = self.layout, self.events.replies.stop
        layout.box.stop(stop, layout.lane, None, **AT_ONCE)
        layout.lane.stop(stop, layout.lane, None, **AT_ONCE)

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
                layout.shelf,
                layout.saved_file,
                js=parts.SHOWN,
                **AT_ONCE,
            )


def _download_as(ending: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: events.download(value, ending)


def _leave_lane(after: Any) -> None:
    """Let the next event in `after` this one: its `then` or its `failure`."""
    after(None, None, None, js="() => window.lane.leave()", api_visibility="private")

"""What each event of the page does.

The user's browser holds the conversation. Each event receives it as the value of
`conversation_list` and returns it changed. The page's process keeps no conversation.
"""

import time
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
from pydantic import ValidationError

from chat_page import files
from chat_page.controls import About, clamp, settings_of
from chat_page.conversation import ChatSettings, Conversation, TooLarge
from chat_page.layout import Layout
from chat_page.markup import unmarked
from chat_page.reply import Replies, explain
from chat_page.tokens import Token, branch, for_view, text_of
from chat_page.transcript import finished, in_progress, transcript, turn_at
from chat_page.words import Words, language_of, preset, words_of
from stream_service.client import StreamClient, StreamError

SECONDS_BETWEEN_SAVES = 1.0

Updates = dict[Any, Any]  # new values of components, as Gradio's events give them


class Events:
    """The events of the page, one method each."""

    def __init__(self, client: StreamClient, layout: Layout) -> None:
        self.replies = Replies(client)
        self._client = client
        self._page = layout

    def about_service(self) -> About:
        """Ask the service for its model, context, defaults and bounds. Raises `StreamError`."""
        try:
            return About.model_validate(self._client.about())
        except ValidationError as error:
            raise StreamError(f"the server at {self._client.url} is not this service") from error

    # Opening a conversation

    def show(self, value: Any, request: gr.Request) -> Iterator[Updates]:
        """Open a conversation: first the messages, then settings within the service's bounds."""
        page, words = self._page, words_of(request)
        conversation = received(value)
        yield {
            page.conversation_list: conversation.model_dump(),
            page.chat: gr.update(
                value=transcript(conversation, words), placeholder=words("welcome")
            ),
            page.event_queue: None,
            page.tokens: (),
            page.token_view: [],
            page.box: gr.update(submit_btn=True, stop_btn=False),
        }
        yield self._service_updates(conversation, words)

    def recover(self, value: Any, request: gr.Request) -> Iterator[Updates]:
        """Show the open conversation again after an event failed; the log has the failure."""
        gr.Warning(words_of(request)("failed"))
        yield from self.show(value, request)

    def show_file(self, text: Any, request: gr.Request) -> Iterator[Updates]:
        """Open a conversation from the text of a file."""
        try:
            conversation = files.from_json(str(text))
        except files.NotAConversation:
            gr.Warning(words_of(request)("not_a_conversation"))
            yield gr.skip()
            return
        yield from self.show(conversation.model_dump(), request)

    def _service_updates(self, conversation: Conversation, words: Words) -> Updates:
        """Ask the service for its model and bounds, and show the conversation's settings."""
        about = None
        try:
            about = self.about_service()
            head, line = about.model, words("ready", context=about.context_length)
        except StreamError as error:
            head, line = words("title"), explain(error, words)
        return {
            self._page.status: f"<h1>{escape(head)}</h1><p>{escape(line)}</p>",
            self._page.service: about,
            **self._page.controls.updates(conversation.settings, about),
        }

    # Writing a reply

    def send(
        self,
        value: Any,
        message: str,
        about: About | None,
        with_tokens: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Append the user's message and write the reply."""
        if not (message and message.strip()):
            yield gr.skip()  # Gradio empties all outputs of a generator that yields nothing
            return
        try:
            conversation = received(value).asked(message)
        except TooLarge:
            gr.Warning(words_of(request)("too_large"))
            yield {self._page.box: message}
            return
        yield from self._write(conversation, request, about, with_tokens)

    def retry(
        self, value: Any, about: About | None, with_tokens: bool, request: gr.Request
    ) -> Iterator[Updates]:
        """Write the last reply again."""
        yield from self._write(received(value).unanswered(), request, about, with_tokens)

    def edit(
        self,
        value: Any,
        about: About | None,
        with_tokens: bool,
        request: gr.Request,
        change: gr.EditData,
    ) -> Iterator[Updates]:
        """Replace one of the user's messages and write the reply to it."""
        conversation = received(value)
        words, message = words_of(request), unmarked(change.value)
        index = turn_at(conversation, change.index, words)
        try:
            changed = conversation.edited(index, message) if message.strip() else None
        except TooLarge:
            gr.Warning(words("too_large"))
            changed = None
        if changed is None:
            yield {self._page.chat: transcript(conversation, words)}
            return
        yield from self._write(changed, request, about, with_tokens)

    def go_on(
        self,
        value: Any,
        about: About | None,
        with_tokens: bool,
        request: gr.Request,
        choice: gr.SelectData,
    ) -> Iterator[Updates]:
        """Continue a reply that ended early, or write the reply again."""
        conversation = received(value)
        if choice.value == "again":
            conversation = conversation.unanswered()
        yield from self._write(conversation, request, about, with_tokens)

    def choose_token(
        self,
        value: Any,
        about: About | None,
        seen: tuple[Token, ...],
        request: gr.Request,
        choice: gr.EventData,
    ) -> Iterator[Updates]:
        """Continue the last reply from an alternative to one of its tokens."""
        conversation = received(value)
        reply = conversation.last_reply
        if reply is None or not seen or not reply.content.endswith(text_of(seen)):
            yield gr.skip()
            return
        prefix = branch(seen, choice.token, choice.choice)
        before = reply.content.removesuffix(text_of(seen))
        turn = reply.model_copy(update={"content": before + text_of(prefix), "problem": None})
        yield from self._write(conversation.replied(turn), request, about, True, prefix)

    def _write(
        self,
        conversation: Conversation,
        request: gr.Request,
        about: About | None,
        with_tokens: bool,
        prefix: tuple[Token, ...] = (),
    ) -> Iterator[Updates]:
        """Show the reply as it grows, and save the conversation at most once per second."""
        page, words = self._page, words_of(request)
        reply_id = self.replies.open()
        earlier = finished(conversation.unanswered().turns, words)
        updates: Updates = {
            page.box: gr.update(submit_btn=False, stop_btn=True),
            page.conversation_list: conversation.model_dump(),
            page.event_queue: reply_id,
            page.tokens: prefix,
            page.token_view: for_view(prefix),
        }
        if about is None:  # the service did not answer when the page was opened
            updates |= self._service_updates(conversation, words)
            about = updates[page.service]
        if about is not None:
            conversation = conversation.with_settings(clamp(conversation.settings, about))
        saved = time.monotonic()
        for progress in self.replies.write(
            reply_id,
            conversation,
            words,
            context_length=about.context_length if about else None,
            prefix_tokens=prefix if with_tokens else None,
        ):
            if progress.is_last:
                yield self._end(conversation.replied(progress.turn), progress.tokens, words)
                return
            updates[page.chat] = [*earlier, *in_progress(progress, words)]
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                updates[page.conversation_list] = conversation.replied(progress.turn).model_dump()
                saved = time.monotonic()
            yield updates
            updates = {}

    def _end(self, conversation: Conversation, seen: tuple[Token, ...], words: Words) -> Updates:
        return {
            self._page.chat: transcript(conversation, words),
            self._page.conversation_list: conversation.model_dump(),
            self._page.tokens: seen,
            self._page.token_view: for_view(seen),
            self._page.box: gr.update(submit_btn=True, stop_btn=False),
            self._page.event_queue: None,
        }

    # Events without a reply

    def undo(self, value: Any, request: gr.Request) -> Updates:
        """Remove the last message with its reply, and put the message back into the box."""
        conversation, message = received(value).undone()
        return {
            self._page.conversation_list: conversation.model_dump(),
            self._page.chat: transcript(conversation, words_of(request)),
            self._page.tokens: (),
            self._page.token_view: [],
            self._page.box: message,
        }

    def reset_settings(self, about: About | None, prompt: str) -> Updates:
        """Show the model's defaults; the system prompt stays."""
        return self._page.controls.updates(ChatSettings(system_prompt=prompt), about)


def received(value: Any) -> Conversation:
    """Validate a conversation from the browser; return a new one if it is invalid."""
    try:
        return Conversation.model_validate(value)
    except ValidationError:
        return Conversation()


def fill_prompt(name: str, request: gr.Request) -> str:
    """The system prompt of a preset, in the user's language."""
    return preset(name, language_of(request))


def keep_settings(value: Any, about: About | None, *fields: Any) -> gr.HTML:
    """Store the panel's settings with the conversation. No other event stores settings."""
    conversation = received(value)
    settings = settings_of(fields, about, conversation.settings)
    kept = conversation.with_settings(settings)
    return gr.HTML(changed_settings=kept.model_dump(include={"id", "settings"}))


def download(value: Any, ending: str) -> dict[str, Any]:
    """The conversation as a file for the browser to save."""
    conversation = received(value)
    make = files.to_json if ending == "json" else files.to_markdown
    # The browser ignores an unchanged value. The time makes a repeated download a new value.
    name = files.file_name(conversation, ending)
    return {"name": name, "text": make(conversation), "at": time.time()}

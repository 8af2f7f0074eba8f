"""The chat page: a Gradio view of the service's stream.

    python llama3_app.py        or        gradio llama3_app.py

It reaches the service over HTTP alone, at LLAMA3_ADDRESS or else ADDRESS, with LLAMA3_API_KEY if
there is one, which stays in this process. This file connects what is in `chat_page`: the visitor's
conversation lives in their browser (the shelf), comes along with each event, and goes back changed.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from typing import Any

# Both are read when gradio is imported. It looks for a free port at the second one by IPv4 alone.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
HOST = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
if ":" in HOST:
    del os.environ["GRADIO_SERVER_NAME"]

import gradio as gr
from pydantic import ValidationError

from chat_page import files, parts
from chat_page.controls import About, Controls, fitting, settings_of
from chat_page.conversation import Conversation, Settings, TooLarge
from chat_page.hosting import end_when_stdin_closes, server_address
from chat_page.look import HEAD, STYLE, THEME
from chat_page.markup import LATEX_DELIMITERS, unmarked
from chat_page.reply import REPLIES_AT_ONCE, Replies, sentence
from chat_page.tokens import Token, branch, for_view, text_of
from chat_page.transcript import finished, in_progress, transcript, turn_at
from chat_page.words import Words, i18n, language_of, preset, words_of
from stream_service.client import StreamClient, StreamError
from stream_service.loopback import bypass_proxies

ADDRESS = "http://127.0.0.1:8800"
SECONDS_BETWEEN_SAVES = 1.0

Updates = dict[Any, Any]

client = StreamClient(
    os.environ.get("LLAMA3_ADDRESS", ADDRESS), api_key=os.environ.get("LLAMA3_API_KEY")
)
replies = Replies(client)


def ask_about() -> About:
    """What the service says of itself. Raises `StreamError`."""
    try:
        return About.model_validate(client.about())
    except ValidationError as error:
        raise StreamError(f"what answers at {client.url} is not this service") from error


def received(value: Any) -> Conversation:
    """The conversation that the browser sent, or a new one where it is none."""
    try:
        return Conversation.model_validate(value)
    except ValidationError:
        return Conversation()


def offered(conversation: Conversation, words: Words) -> Updates:
    """What the service offers now, and the conversation's settings by its bounds and defaults."""
    about = None
    try:
        about = ask_about()
        head, line = about.model, words("ready", context=about.context_length)
    except StreamError as error:
        head, line = words("title"), sentence(error, words)
    return {
        status: f"<h1>{escape(head)}</h1><p>{escape(line)}</p>",
        service: about,
        **controls.updates(conversation.settings, about),
    }


def show(value: Any, request: gr.Request) -> Iterator[Updates]:
    """Open a conversation: its messages, then what the service offers and its settings."""
    conversation, words = received(value), words_of(request)
    yield {
        shelf: conversation.model_dump(),
        chat: gr.update(value=transcript(conversation, words), placeholder=words("welcome")),
        lane: None,
        tokens: (),
        token_view: [],
        box: gr.update(submit_btn=True, stop_btn=False),
    }
    yield offered(conversation, words)


def recover(value: Any, request: gr.Request) -> Iterator[Updates]:
    """After an event that failed here, which the log tells of: show what is open as it is."""
    gr.Warning(words_of(request)("failed"))
    yield from show(value, request)


def show_file(text: Any, request: gr.Request) -> Iterator[Updates]:
    try:
        conversation = files.from_json(str(text))
    except files.NotAConversation:
        gr.Warning(words_of(request)("not_a_conversation"))
        yield gr.skip()
        return
    yield from show(conversation.model_dump(), request)


def write(
    conversation: Conversation,
    request: gr.Request,
    about: About | None,
    with_tokens: bool,
    begun: tuple[Token, ...] = (),
) -> Iterator[Updates]:
    """Let the reply grow on the page, and keep the conversation with it now and then."""
    words = words_of(request)
    reply_id = replies.open()
    earlier = finished(conversation.unanswered().turns, words)
    updates: Updates = {
        box: gr.update(submit_btn=False, stop_btn=True),
        shelf: conversation.model_dump(),
        lane: reply_id,
        tokens: begun,
        token_view: for_view(begun),
    }
    if about is None:  # the service was away when the page was opened
        updates |= offered(conversation, words)
        about = updates[service]
    if about is not None:
        conversation = conversation.with_settings(fitting(conversation.settings, about))
    saved = time.monotonic()
    for progress in replies.write(
        reply_id,
        conversation,
        words,
        context_length=about.context_length if about else None,
        begun=begun if with_tokens else None,
    ):
        if progress.is_last:
            yield end_of(conversation.replied(progress.turn), progress.tokens, words)
            return
        updates[chat] = [*earlier, *in_progress(progress, words)]
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            updates[shelf] = conversation.replied(progress.turn).model_dump()
            saved = time.monotonic()
        yield updates
        updates = {}


def end_of(conversation: Conversation, seen: tuple[Token, ...], words: Words) -> Updates:
    return {
        chat: transcript(conversation, words),
        shelf: conversation.model_dump(),
        tokens: seen,
        token_view: for_view(seen),
        box: gr.update(submit_btn=True, stop_btn=False),
        lane: None,
    }


def send(
    value: Any,
    message: str,
    about: About | None,
    with_tokens: bool,
    request: gr.Request,
) -> Iterator[Updates]:
    if not (message and message.strip()):
        yield gr.skip()  # where nothing comes at all, Gradio empties every output
        return
    try:
        conversation = received(value).asked(message)
    except TooLarge:
        gr.Warning(words_of(request)("too_large"))
        yield {box: message}
        return
    yield from write(conversation, request, about, with_tokens)


def retry(
    value: Any, about: About | None, with_tokens: bool, request: gr.Request
) -> Iterator[Updates]:
    yield from write(received(value).unanswered(), request, about, with_tokens)


def edit(
    value: Any,
    about: About | None,
    with_tokens: bool,
    request: gr.Request,
    change: gr.EditData,
) -> Iterator[Updates]:
    conversation = received(value)
    words, message = words_of(request), unmarked(change.value)
    index = turn_at(conversation, change.index, words)
    try:
        changed = conversation.edited(index, message) if message.strip() else None
    except TooLarge:
        gr.Warning(words("too_large"))
        changed = None
    if changed is None:
        yield {chat: transcript(conversation, words)}
        return
    yield from write(changed, request, about, with_tokens)


def go_on(
    value: Any,
    about: About | None,
    with_tokens: bool,
    request: gr.Request,
    way: gr.SelectData,
) -> Iterator[Updates]:
    """What the buttons under a reply do that is missing or was cut short."""
    conversation = received(value)
    if way.value == "again":
        conversation = conversation.unanswered()
    yield from write(conversation, request, about, with_tokens)


def take(
    value: Any,
    about: About | None,
    seen: tuple[Token, ...],
    request: gr.Request,
    choice: gr.EventData,
) -> Iterator[Updates]:
    """Go on from another token than the one that was drawn."""
    conversation = received(value)
    reply = conversation.last_reply
    if reply is None or not seen or not reply.content.endswith(text_of(seen)):
        yield gr.skip()
        return
    begun = branch(seen, choice.token, choice.choice)
    before = reply.content.removesuffix(text_of(seen))
    turn = reply.model_copy(update={"content": before + text_of(begun), "problem": None})
    yield from write(conversation.replied(turn), request, about, True, begun)


def undo(value: Any, request: gr.Request) -> Updates:
    conversation, message = received(value).undone()
    return {
        shelf: conversation.model_dump(),
        chat: transcript(conversation, words_of(request)),
        tokens: (),
        token_view: [],
        box: message,
    }


def fill_prompt(name: str, request: gr.Request) -> str:
    return preset(name, language_of(request))


def keep_settings(value: Any, about: About | None, *fields: Any) -> gr.HTML:
    """The conversation has its settings from here alone: each change of a field comes here."""
    conversation = received(value)
    settings = settings_of(fields, about, conversation.settings)
    kept = conversation.with_settings(settings)
    return gr.HTML(set=kept.model_dump(include={"id", "settings"}))


def download(value: Any, ending: str) -> dict[str, Any]:
    conversation = received(value)
    make = files.to_json if ending == "json" else files.to_markdown
    # The time makes two downloads of the same two values.
    name = files.file_name(conversation, ending)
    return {"name": name, "text": make(conversation), "at": time.time()}


with gr.Blocks(title="Llama 3, streamed", analytics_enabled=False, fill_height=True) as demo:
    service = gr.State(None)  # About, as far as it is known
    lane = parts.lane()  # the id of the reply that is being written
    tokens = gr.State(())  # of the last reply
    saved_file = parts.download()
    with gr.Sidebar(width=280, elem_id="left"):
        new = gr.Button(i18n("new"), variant="primary")
        shelf = parts.conversation_shelf()
        with gr.Row():
            as_markdown = gr.Button(i18n("export_markdown"), size="sm", min_width=80)
            as_json = gr.Button(i18n("export_json"), size="sm", min_width=80)
    with gr.Sidebar(position="right", open=False, width=320, elem_id="right"):
        with_tokens = gr.Checkbox(
            label=i18n("token_view"), info=i18n("token_view_info"), container=False
        )
        controls = Controls()
    status = gr.HTML(elem_id="status")
    chat = gr.Chatbot(
        show_label=False,
        label=i18n("chat"),
        buttons=["copy"],
        editable="user",
        layout="panel",
        group_consecutive_messages=False,
        latex_delimiters=LATEX_DELIMITERS,
        feedback_options=None,
        scale=1,
        autoscroll=False,  # which would hold fast who scrolls up; `follow.js` does not
        elem_id="chat",
    )
    with gr.Group(visible="hidden", elem_id="tokens") as token_panel:
        token_view = parts.token_view()
    box = gr.Textbox(
        placeholder=i18n("ask"),
        label=i18n("message"),
        show_label=False,
        submit_btn=True,
        lines=1,
        max_lines=10,
        autofocus=True,
        elem_id="box",
    )

    fields = list(controls.fields.values())
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    small = {"queue": False, **quiet}
    every = {"trigger_mode": "multiple"}  # also while the same event's last one is not over
    opening = {
        "inputs": shelf,
        "outputs": [shelf, chat, status, service, lane, tokens, token_view, box, *controls.shown],
        **every,
        **quiet,
    }
    writing = {
        "outputs": [box, shelf, chat, lane, tokens, token_view, status, service, *controls.shown],
        "js": parts.ENTER,
        "concurrency_limit": None,  # `replies` has one
        **quiet,
    }
    given = [shelf, service, with_tokens]
    keeping = {
        "fn": keep_settings,
        "inputs": [shelf, service, *fields],
        "outputs": shelf,
        "js": parts.ENTER_PATIENTLY,
        **every,
        **small,
    }
    preset_chosen = controls.preset.input(
        fill_prompt, controls.preset, controls.system_prompt, **small
    )
    reset = controls.reset.click(
        lambda about, prompt: controls.updates(Settings(system_prompt=prompt), about),
        [service, controls.system_prompt],
        controls.shown,
        **small,
    )
    settled = [field.release if isinstance(field, gr.Slider) else field.blur for field in fields]

    for event in (
        demo.load(show, js=parts.OPENED, **opening),
        shelf.choose(show, js=parts.CHOSEN, **opening),
        shelf.bring(show_file, js=parts.BROUGHT, **opening),
        shelf.fresh(show, js=parts.DELETED, **opening),
        new.click(show, js=parts.NEW, **opening),
        box.submit(
            send, [shelf, box, service, with_tokens], **(writing | {"js": parts.SEND} | every)
        ),
        chat.retry(retry, given, **writing),
        chat.edit(edit, given, **writing),
        chat.option_select(go_on, given, **writing),
        token_view.take(take, [shelf, service, tokens], **writing),
        chat.undo(undo, shelf, [shelf, chat, tokens, token_view, box], js=parts.ENTER, **small),
        gr.on(settled, **keeping),
        preset_chosen.then(**keeping),
        reset.then(**keeping),
    ):
        parts.leave_lane(event.then)
        recovered = event.failure(recover, js=parts.SHOWN, **opening)
        parts.leave_lane(recovered.then)
        parts.leave_lane(recovered.failure)

    box.stop(replies.stop, lane, None, **small)
    lane.stop(replies.stop, lane, None, **small)
    with_tokens.input(
        lambda on: gr.update(visible=on or "hidden"), with_tokens, token_panel, **small
    )
    saving = {"inputs": shelf, "outputs": saved_file, "js": parts.SHOWN, **small}
    as_markdown.click(lambda value: download(value, "md"), **saving)
    as_json.click(lambda value: download(value, "json"), **saving)

demo.queue(max_size=4 * REPLIES_AT_ONCE, default_concurrency_limit=None)


def main() -> None:
    """Serve the page until it is ended."""
    parser = argparse.ArgumentParser(description="The chat page of a running LLM Stream Service.")
    parser.add_argument(
        "--auth",
        metavar="NAME:PASSWORD",
        default=os.environ.get("LLAMA3_APP_AUTH"),
        help="ask visitors for them. Others on the machine can read a command line: "
        "LLAMA3_APP_AUTH is better",
    )
    parser.add_argument(
        "--share", action="store_true", help="a public address by Gradio's relay (off)"
    )
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    name, _, password = (args.auth or "").partition(":")
    if args.auth and not (name and password):
        parser.error("--auth wants NAME:PASSWORD")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what follows is tidied up
    ended = contextlib.suppress(KeyboardInterrupt)
    with ended, tempfile.TemporaryDirectory(prefix="llm-chat-page-") as empty:
        if args.until_stdin_closes:
            end_when_stdin_closes()
        os.environ["GRADIO_TEMP_DIR"] = empty
        os.chdir(empty)  # Gradio may serve what lies where it runs
        try:
            serve((name, password) if args.auth else None, share=args.share)
        except Exception as error:
            sys.exit(f"the chat page could not start: {error}")


def serve(auth: tuple[str, str] | None, *, share: bool) -> None:
    """Serve the page until it is interrupted. Raises `OSError` if its port is in use."""
    host, port = server_address(HOST)
    bypass_proxies(host)  # Gradio asks its own address whether it can be reached
    demo.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=share,
        max_threads=REPLIES_AT_ONCE + 16,
        max_file_size=1,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        i18n=i18n,
        theme=THEME,
        css=STYLE,
        head=HEAD,
    )


# `gradio llama3_app.py` runs this file again at each change, for `demo` alone.
if __name__ == "__main__" and gr.NO_RELOAD:
    main()

"""The chat page's events, and the chat page as a process."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import psutil
import pytest
import requests
from support.fakes import fake_checkpoint, says
from support.service import ServiceFactory

from chat_page import events
from chat_page.controls import About, settings_of
from chat_page.conversation import (
    MAX_CHARACTERS,
    MAX_TURNS,
    ChatSettings,
    Conversation,
    Turn,
)
from chat_page.page import Page
from chat_page.tokens import Alternative
from stream_service.client import StreamClient

ROOT = Path(__file__).parents[2]
TIMEOUT = 60


def page_at(url: str) -> Page:
    """A page for the service at this address."""
    return Page(StreamClient(url))


def outcome(updates: Iterator[dict[Any, Any]]) -> dict[Any, Any]:
    """The last value of each component."""
    shown: dict[Any, Any] = {}
    for update in updates:
        shown |= update
    return shown


def kept(page: Page, shown: dict[Any, Any]) -> list[str]:
    return [turn["content"] for turn in shown[page.layout.conversation_list]["turns"]]


def ask(page: Page, message: str, value: Any = None, with_tokens: bool = False) -> dict[Any, Any]:
    return outcome(page.events.send(value, message, None, with_tokens, None))


def test_a_message_gets_a_reply_and_the_conversation_is_kept(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("彩虹!"))).url)
    shown = ask(page, "hi")
    assert kept(page, shown) == ["hi", "彩虹!"]
    more = ask(page, "more", shown[page.layout.conversation_list])
    assert kept(page, more) == ["hi", "彩虹!", "more", "彩虹!"]
    assert shown[page.layout.box] == gr.update(submit_btn=True, stop_btn=False)
    assert shown[page.layout.event_queue] is None
    assert outcome(page.events.send(None, "  ", None, False, None)) == gr.skip()


def test_a_message_is_kept_before_its_reply_begins(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    first = next(page.events.send(None, "hi", None, False, None))
    assert kept(page, first) == ["hi"]
    assert first[page.layout.box]["stop_btn"] is True
    assert first[page.layout.event_queue]


def test_a_reply_can_be_continued_retried_edited_and_undone(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("abcd"))).url)
    short = Conversation(settings=ChatSettings(max_new_tokens=2)).model_dump()
    cut = ask(page, "hi", short)
    assert kept(page, cut) == ["hi", "ab"]
    value = cut[page.layout.conversation_list]
    context = (value, page.events.about_service(), False, None)
    on = outcome(page.events.go_on(*context, SimpleNamespace(value="go_on")))
    assert kept(page, on) == ["hi", "abcd"]
    again = outcome(page.events.go_on(*context, SimpleNamespace(value="again")))
    assert kept(page, again) == ["hi", "ab"]
    assert kept(page, outcome(page.events.retry(*context))) == ["hi", "ab"]
    change = SimpleNamespace(index=0, value="h\u2060o")
    assert kept(page, outcome(page.events.edit(*context, change))) == ["ho", "ab"]
    undone = page.events.undo(value, None)
    assert (kept(page, undone), undone[page.layout.box]) == ([], "hi")


def test_choosing_another_token_continues_the_reply_from_that_token(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("abcd"))).url)
    shown = ask(page, "hi", with_tokens=True)
    assert [token.text for token in shown[page.layout.tokens]] == list("abcd")
    assert [cell["text"] for cell in shown[page.layout.token_view]] == list("abcd")
    other = shown[page.layout.tokens][1].model_copy(
        update={"alternatives": (Alternative("Z", 0.1),)}
    )
    tokens = (*shown[page.layout.tokens][:1], other, *shown[page.layout.tokens][2:])
    choice = SimpleNamespace(token=1, choice=0)
    after = outcome(
        page.events.choose_token(shown[page.layout.conversation_list], None, tokens, None, choice)
    )
    assert kept(page, after) == ["hi", "aZcd"]
    assert [token.text for token in after[page.layout.tokens]] == ["a", "Z", "c", "d"]
    stale = outcome(page.events.choose_token(None, None, tokens, None, choice))
    assert stale == gr.skip()


def test_invalid_data_from_the_browser_becomes_an_empty_conversation() -> None:
    for nonsense in (None, 7, "x", {"turns": [{"role": "system", "content": "x"}]}, [1]):
        assert events.received(nonsense).turns == ()


def test_an_opened_conversation_shows_its_settings(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    settings = ChatSettings(temperature=1.5, stop=("x", "y"), system_prompt="p")
    value = Conversation().asked("hi").with_settings(settings).model_dump()
    shown = outcome(page.events.show(value, None))
    fields = page.layout.controls.fields
    assert shown[fields["temperature"]]["value"] == 1.5
    assert shown[fields["temperature"]]["maximum"] == 5
    assert shown[fields["max_new_tokens"]]["maximum"] == 512
    assert shown[fields["stop"]] == "x\ny"
    assert shown[fields["system_prompt"]] == "p"
    assert "fake" in shown[page.layout.status]
    assert kept(page, shown) == ["hi"]


def test_a_setting_out_of_bounds_becomes_the_nearest_allowed_one(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    settings = ChatSettings(max_new_tokens=8192, temperature=-1.0, seed=None)
    shown = outcome(page.events.show(Conversation().with_settings(settings).model_dump(), None))
    fields = page.layout.controls.fields
    assert shown[fields["max_new_tokens"]]["value"] == 512
    assert shown[fields["temperature"]]["value"] == 0
    assert shown[fields["seed"]]["value"] is None
    answered = ask(page, "hi", shown[page.layout.conversation_list])
    used = answered[page.layout.conversation_list]["turns"][-1]["figures"]["params"]
    assert used["max_new_tokens"] == 512 - 18, "the prompt has 18 tokens"


def test_a_message_too_large_to_keep_goes_back_into_the_input_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", said.append)
    page = page_at("http://127.0.0.1:9")
    message = "a" * (MAX_CHARACTERS + 1)
    assert ask(page, message) == {page.layout.box: message}
    full = Conversation(turns=(Turn(role="user", content="hi"),) * MAX_TURNS)
    assert ask(page, "hi", full.model_dump()) == {page.layout.box: "hi"}
    assert len([text for text in said if "too long to be saved" in text]) == 2


def test_a_message_cannot_be_replaced_by_blank_text(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    value = ask(page, "hi")[page.layout.conversation_list]
    change = SimpleNamespace(index=0, value=" ")
    shown = outcome(page.events.edit(value, None, False, None, change))
    assert list(shown) == [page.layout.chat]
    assert len(shown[page.layout.chat]) == 3


def test_events_without_effect_leave_the_page_unchanged(serve: ServiceFactory) -> None:
    """Gradio empties every component if an event's generator yields nothing."""
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    choice = gr.EventData(None, {"token": 0, "choice": 0})
    value = Conversation().asked("hi").model_dump()
    assert list(page.events.send(value, " ", None, False, None)) == [gr.skip()]
    assert list(page.events.choose_token(value, None, (), None, choice)) == [gr.skip()]


def test_a_conversation_opens_although_the_service_is_unreachable() -> None:
    page = page_at("http://127.0.0.1:9")
    shown = outcome(page.events.show(Conversation().asked("hi").model_dump(), None))
    assert "Cannot reach the service" in shown[page.layout.status]
    assert kept(page, shown) == ["hi"]


def test_only_settings_that_differ_from_the_models_defaults_are_kept() -> None:
    about = About(model="m", context_length=9, defaults={"temperature": 0.6, "top_p": 0.9})
    same = ("", 0.6, 0.9, 0, 0, 1, 0, None, None, "")
    assert settings_of(same, about, ChatSettings(seed=9)) == ChatSettings()
    other = ("p", 0.7, 0.9, 5, 0, 1.1, 4, 7, 3, "a\n\nb")
    assert settings_of(other, about, ChatSettings()) == ChatSettings(
        system_prompt="p", temperature=0.7, top_k=5, repetition_penalty=1.1, min_new_tokens=4,
        max_new_tokens=7, seed=3, stop=("a", "b"),
    )  # fmt: skip


def test_a_message_uses_its_conversations_settings_and_not_the_shown_fields(
    serve: ServiceFactory,
) -> None:
    page = page_at(serve(fake_checkpoint(says("abcd"))).url)
    about = page.events.about_service()
    fields = ("", 0.6, 1.0, 0, 0, 1, 0, 3, None, "")
    changed = events.keep_settings(None, about, *fields).props["changed_settings"]
    assert changed["settings"]["max_new_tokens"] == 3
    conversation = Conversation(id=changed["id"], settings=ChatSettings(**changed["settings"]))
    assert kept(page, ask(page, "hi", conversation.model_dump())) == ["hi", "abc"]


def test_a_conversation_keeps_its_settings_while_the_service_is_away(serve: ServiceFactory) -> None:
    page = page_at("http://127.0.0.1:9")
    value = Conversation().with_settings(ChatSettings(temperature=0.5)).model_dump()
    away = outcome(page.events.send(value, "hi", None, False, None))
    assert "Cannot reach the service" in away[page.layout.status]
    value = away[page.layout.conversation_list]
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    back = outcome(page.events.send(value, "hi", None, False, None))
    assert "fake" in back[page.layout.status]
    assert back[page.layout.controls.fields["temperature"]]["value"] == 0.5
    assert (
        back[page.layout.conversation_list]["turns"][-1]["figures"]["params"]["temperature"] == 0.5
    )


def test_the_service_knows_every_setting_of_the_page(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    about = page.events.about_service()
    names = set(ChatSettings.model_fields) - {"system_prompt"}
    assert names <= about.bounds.keys()
    for name in names - {"stop"}:
        ends = about.range(name)
        assert 0 <= ends["minimum"] < ends["maximum"] < 2**53


def test_gradio_runs_visitors_events_in_parallel_and_bounds_its_queue() -> None:
    page = page_at("http://127.0.0.1:9")
    functions = page.blocks.fns.values()
    assert page.blocks._queue.default_concurrency_limit is None
    assert {f.concurrency_limit for f in functions} <= {None, "default"}, "`Replies` limits them"
    assert page.blocks._queue.max_size is not None
    assert page.blocks.analytics_enabled is False
    assert all(f.api_visibility == "private" for f in functions), "programs use the service's API"


def page_process(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """Start `python llama3_app.py`, by default on a free port."""
    return subprocess.Popen(
        [sys.executable, "llama3_app.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "GRADIO_SERVER_PORT": "0", "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[str]:
    """Start `python llama3_app.py` on a free port, and yield its address."""
    with started_process(*arguments, **environment) as (url, _):
        yield url


@contextmanager
def started_process(*arguments: str, **environment: str) -> Iterator[tuple[str, int]]:
    """Start `python llama3_app.py`, and yield its address and process id."""
    with page_process(*arguments, **environment) as process:
        try:
            yield address_of(process), process.pid
        finally:
            process.terminate()


def address_of(process: "subprocess.Popen[str]") -> str:
    """The address that a page prints at start."""
    assert process.stdout is not None
    line = next(line for line in process.stdout if "http://" in line)
    return line[line.index("http://") :].split()[0]


def test_a_page_whose_port_is_taken_reports_it_and_tries_no_other() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with page_process(GRADIO_SERVER_PORT=str(port)) as process:
            said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert said.startswith(f"the chat page could not start: it cannot listen on 127.0.0.1:{port}")
    assert "choose another --app-port" in said
    assert len(said.splitlines()) == 1


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_page_can_listen_at_an_ipv6_address() -> None:
    with started(GRADIO_SERVER_NAME="::1") as url:
        assert url.startswith("http://[::1]:")
        assert requests.get(url, timeout=TIMEOUT).ok


def test_a_page_ends_when_its_standard_input_closes() -> None:
    """A shell ignores SIGINT for commands in the background; the page must end there, too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started = page_process("--until-stdin-closes")
    finally:
        signal.signal(signal.SIGINT, before)
    with started as process:
        url = address_of(process)
        assert requests.get(url, timeout=TIMEOUT).ok
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in said


def test_a_page_sends_no_secrets_and_serves_no_files() -> None:
    with started(LLAMA3_API_KEY="a-secret-key", LLAMA3_ADDRESS="http://127.0.0.1:9") as url:
        html = requests.get(url).text
        assert "Content-Security-Policy" in html
        assert "a-secret-key" not in html
        assert "127.0.0.1:9" not in html
        loaded = re.findall(
            r"""<(?:script|link|img)\b[^>]*(?:src|href)=["'](https?:[^"']*)""", html
        )
        assert [address for address in loaded if not address.startswith(url)] == []
        for path in ("llama3_app.py", str(ROOT / "llama3_app.py"), "/etc/passwd", "."):
            answer = requests.get(f"{url}/gradio_api/file={path}")
            assert answer.status_code in (403, 404), path
        upload = requests.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"x" * 100)})
        assert upload.status_code == 413


def test_a_page_runs_in_an_empty_directory_and_removes_it_at_the_end() -> None:
    with started_process() as (_, pid):
        directory = Path(psutil.Process(pid).cwd())
        assert list(directory.iterdir()) == []
    assert not directory.exists()


def test_a_page_with_a_password_rejects_visitors_without_it() -> None:
    with started("--auth", "ann:secret") as url:
        assert requests.get(f"{url}/config").status_code == 401
        wrong = requests.post(f"{url}/login", data={"username": "ann", "password": "x"})
        assert wrong.status_code == 400
        right = requests.Session()
        right.post(f"{url}/login", data={"username": "ann", "password": "secret"})
        assert right.get(f"{url}/config").status_code == 200

"""The chat page: what its events do with a conversation, and what it keeps to itself."""

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
    """The page of the service at this address."""
    return Page(StreamClient(url))


def outcome(updates: Iterator[dict[Any, Any]]) -> dict[Any, Any]:
    """What each component has in the end."""
    shown: dict[Any, Any] = {}
    for update in updates:
        shown |= update
    return shown


def kept(page: Page, shown: dict[Any, Any]) -> list[str]:
    return [turn["content"] for turn in shown[page.layout.conversation_list]["turns"]]


def ask(page: Page, message: str, value: Any = None, with_tokens: bool = False) -> dict[Any, Any]:
    return outcome(page.events.send(value, message, None, with_tokens, None))


def test_a_message_is_answered_and_the_conversation_kept(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("彩虹!"))).url)
    shown = ask(page, "hi")
    assert kept(page, shown) == ["hi", "彩虹!"]
    more = ask(page, "more", shown[page.layout.conversation_list])
    assert kept(page, more) == ["hi", "彩虹!", "more", "彩虹!"]
    assert shown[page.layout.box] == gr.update(submit_btn=True, stop_btn=False)
    assert shown[page.layout.event_queue] is None
    assert outcome(page.events.send(None, "  ", None, False, None)) == gr.skip()


def test_the_visitors_message_is_kept_before_its_reply(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    first = next(page.events.send(None, "hi", None, False, None))
    assert kept(page, first) == ["hi"]
    assert first[page.layout.box]["stop_btn"] is True
    assert first[page.layout.event_queue]


def test_retry_edit_undo_and_going_on(serve: ServiceFactory) -> None:
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


def test_another_token_can_be_taken(serve: ServiceFactory) -> None:
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


def test_what_the_browser_sends_is_not_trusted() -> None:
    for nonsense in (None, 7, "x", {"turns": [{"role": "system", "content": "x"}]}, [1]):
        assert events.received(nonsense).turns == ()


def test_a_conversation_opens_with_its_settings(serve: ServiceFactory) -> None:
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


def test_settings_that_this_model_does_not_allow_are_shown_as_the_nearest_it_does(
    serve: ServiceFactory,
) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    settings = ChatSettings(max_new_tokens=8192, temperature=-1.0, seed=None)
    shown = outcome(page.events.show(Conversation().with_settings(settings).model_dump(), None))
    fields = page.layout.controls.fields
    assert shown[fields["max_new_tokens"]]["value"] == 512
    assert shown[fields["temperature"]]["value"] == 0
    assert shown[fields["seed"]]["value"] is None
    answered = ask(page, "hi", shown[page.layout.conversation_list])
    used = answered[page.layout.conversation_list]["turns"][-1]["figures"]["params"]
    assert used["max_new_tokens"] == 512 - 18, "the prompt has 18"


def test_what_is_too_large_to_be_kept_goes_back_into_the_box(
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


def test_a_message_is_not_edited_away(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    value = ask(page, "hi")[page.layout.conversation_list]
    change = SimpleNamespace(index=0, value=" ")
    shown = outcome(page.events.edit(value, None, False, None, change))
    assert list(shown) == [page.layout.chat]
    assert len(shown[page.layout.chat]) == 3


def test_what_gives_nothing_changes_nothing(serve: ServiceFactory) -> None:
    """Gradio empties every component where a generator yields nothing at all."""
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    choice = gr.EventData(None, {"token": 0, "choice": 0})
    value = Conversation().asked("hi").model_dump()
    assert list(page.events.send(value, " ", None, False, None)) == [gr.skip()]
    assert list(page.events.choose_token(value, None, (), None, choice)) == [gr.skip()]


def test_a_service_that_is_away_is_said_and_the_conversation_still_opens() -> None:
    page = page_at("http://127.0.0.1:9")
    shown = outcome(page.events.show(Conversation().asked("hi").model_dump(), None))
    assert "Cannot reach the service" in shown[page.layout.status]
    assert kept(page, shown) == ["hi"]


def test_only_settings_that_differ_from_the_models_own_are_chosen() -> None:
    about = About(model="m", context_length=9, defaults={"temperature": 0.6, "top_p": 0.9})
    same = ("", 0.6, 0.9, 0, 0, 1, 0, None, None, "")
    assert settings_of(same, about, ChatSettings(seed=9)) == ChatSettings()
    other = ("p", 0.7, 0.9, 5, 0, 1.1, 4, 7, 3, "a\n\nb")
    assert settings_of(other, about, ChatSettings()) == ChatSettings(
        system_prompt="p", temperature=0.7, top_k=5, repetition_penalty=1.1, min_new_tokens=4,
        max_new_tokens=7, seed=3, stop=("a", "b"),
    )  # fmt: skip


def test_a_message_goes_with_its_conversations_settings_whatever_the_fields_show(
    serve: ServiceFactory,
) -> None:
    page = page_at(serve(fake_checkpoint(says("abcd"))).url)
    about = page.events.about_service()
    fields = ("", 0.6, 1.0, 0, 0, 1, 0, 3, None, "")
    changed = events.keep_settings(None, about, *fields).props["changed_settings"]
    assert changed["settings"]["max_new_tokens"] == 3
    conversation = Conversation(id=changed["id"], settings=ChatSettings(**changed["settings"]))
    assert kept(page, ask(page, "hi", conversation.model_dump())) == ["hi", "abc"]


def test_settings_outlive_a_service_that_was_away(serve: ServiceFactory) -> None:
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


def test_the_pages_settings_are_ones_that_the_service_knows(serve: ServiceFactory) -> None:
    page = page_at(serve(fake_checkpoint(says("a"))).url)
    about = page.events.about_service()
    names = set(ChatSettings.model_fields) - {"system_prompt"}
    assert names <= about.bounds.keys()
    for name in names - {"stop"}:
        ends = about.range(name)
        assert 0 <= ends["minimum"] < ends["maximum"] < 2**53


def test_visitors_do_not_wait_for_each_other_and_the_queue_is_bounded() -> None:
    page = page_at("http://127.0.0.1:9")
    functions = page.blocks.fns.values()
    assert page.blocks._queue.default_concurrency_limit is None
    assert {f.concurrency_limit for f in functions} <= {None, "default"}, "replies have their own"
    assert page.blocks._queue.max_size is not None
    assert page.blocks.analytics_enabled is False
    assert all(f.api_visibility == "private" for f in functions), "the service is the API"


def page_process(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    """`python llama3_app.py`, on a free port if none is given."""
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
    """`python llama3_app.py` on a free port, and its address."""
    with started_process(*arguments, **environment) as (url, _):
        yield url


@contextmanager
def started_process(*arguments: str, **environment: str) -> Iterator[tuple[str, int]]:
    """The same, with the id of its process."""
    with page_process(*arguments, **environment) as process:
        try:
            yield address_of(process), process.pid
        finally:
            process.terminate()


def address_of(process: "subprocess.Popen[str]") -> str:
    """What a page says that it listens at."""
    assert process.stdout is not None
    line = next(line for line in process.stdout if "http://" in line)
    return line[line.index("http://") :].split()[0]


def test_a_page_whose_port_is_taken_says_so_and_takes_no_other() -> None:
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
def test_a_page_listens_at_an_ipv6_address_too() -> None:
    with started(GRADIO_SERVER_NAME="::1") as url:
        assert url.startswith("http://[::1]:")
        assert requests.get(url, timeout=TIMEOUT).ok


def test_a_page_ends_with_the_service_that_holds_its_input() -> None:
    """Also where SIGINT is ignored, as a shell has it for what runs in the background."""
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


def test_a_started_page_keeps_its_secrets_and_serves_no_files() -> None:
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
        assert '"share":false' in html.replace(" ", "") or "gradio.live" not in html


def test_a_started_page_works_in_an_empty_directory_that_it_removes() -> None:
    with started_process() as (_, pid):
        place = Path(psutil.Process(pid).cwd())
        assert list(place.iterdir()) == []
    assert not place.exists()


def test_a_page_with_a_password_asks_for_it() -> None:
    with started("--auth", "ann:secret") as url:
        assert requests.get(f"{url}/config").status_code == 401
        wrong = requests.post(f"{url}/login", data={"username": "ann", "password": "x"})
        assert wrong.status_code == 400
        right = requests.Session()
        right.post(f"{url}/login", data={"username": "ann", "password": "secret"})
        assert right.get(f"{url}/config").status_code == 200

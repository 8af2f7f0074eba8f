"""The page in a real browser, on the real service with the demo model.

python -m pytest -m browser        (wants a Chromium: apt-get install chromium)
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect
from support.browser import started_chromium, started_page, started_service, visit
from support.processes import Process

from stream_service.client import StreamClient

pytestmark = [
    pytest.mark.browser,
    # Playwright leaves the loop that it runs in to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SECONDS = 30
SHORT = {"max_new_tokens": 12, "temperature": 0}
LONG = {"min_new_tokens": 1500, "max_new_tokens": 1500, "temperature": 0.8, "seed": 1}
ASK = "Write a long story about the sea."
CODE = "```python\nfor n in range(3):\n    print('<b>', n)\n```"
RICH = f"<think>\nhidden thoughts\n</think>\n\n# Head\n\nText with $x^2$ and `code`.\n\n{CODE}\n\n"
RICH += "| a | b |\n|---|---|\n| 1 | 2 |\n\n- one\n- two\n\n[a link](https://example.org)"


@pytest.fixture(scope="module")
def service() -> Iterator[Process]:
    with started_service() as running:
        yield running


@pytest.fixture(scope="module")
def address(service: Process) -> Iterator[Process]:
    with started_page(service) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with started_chromium() as browser:
        yield browser


@pytest.fixture
def visitor(chromium: Browser, address: Process) -> Iterator[Callable[..., Page]]:
    """Visitors with a browser profile each. Whatever they do, nothing is loaded from elsewhere."""
    contexts: list[BrowserContext] = []
    elsewhere: list[str] = []
    errors: list[str] = []

    def note(url: str) -> None:
        if not url.startswith((address.url, "data:", "blob:")):
            elsewhere.append(url)

    def come(turns: Any = None, profile: dict[str, Any] | None = None, **settings: Any) -> Page:
        options = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
        context = chromium.new_context(**(options | (profile or {})))
        context.set_default_timeout(SECONDS * 1000)
        context.on("request", lambda request: note(request.url))
        contexts.append(context)
        page = visit(context, address.url, turns, **(settings or SHORT))
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    expect.set_options(timeout=SECONDS * 1000)
    yield come
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert errors == []


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def talk(answer: str = "The sea is blue.", question: str = "What is the sea?") -> list[Any]:
    figures = {"prompt_tokens": 5, "completion_tokens": 4, "finish_reason": "stop"}
    figures["params"] = {"temperature": 0.5}
    return [said("user", question), said("assistant", answer, figures=figures)]


def send(page: Page, text: str) -> None:
    page.locator("#box textarea").fill(text)
    page.keyboard.press("Enter")


def halt(page: Page) -> None:
    """Stop the reply that `writing` waits for; it may have ended by itself by now."""
    page.wait_for_function("window.began")
    page.evaluate("document.querySelector('#box .stop-button')?.click()")


def answers(page: Page) -> Locator:
    """The model's texts, without the lines of figures."""
    return page.locator(
        "#chat .bot-row:not(:has(.meter, .notice, .thought-group)) .message-content"
    )


def meters(page: Page) -> Locator:
    return page.locator("#chat .meter")


@contextmanager
def writing(page: Page) -> Iterator[None]:
    """What the block does begins a reply; after the block, it has been written."""
    page.evaluate(
        """() => {
            window.began = false;
            new MutationObserver((changes, observer) => {
                if (!document.querySelector("#box .stop-button")) return;
                window.began = true;
                observer.disconnect();
            }).observe(document.querySelector("#box"), {subtree: true, childList: true});
        }"""
    )
    yield
    page.wait_for_function("window.began && !document.querySelector('#box .stop-button')")


@contextmanager
def settling(page: Page, events: int) -> Iterator[None]:
    """What the block does sets off so many events; after the block, each has had its turn."""
    page.evaluate(
        """() => {
            window.entered = 0;
            const enter = (window.enter ??= window.lane.enter);
            window.lane.enter = (...values) => (window.entered++, enter(...values));
        }"""
    )
    yield
    page.wait_for_function(f"window.entered >= {events}")
    page.evaluate("window.lane.enter(null, false).then(() => window.lane.leave())")


def conversations(page: Page) -> dict[str, Any]:
    """What the browser keeps, by its names."""
    return {kept["name"]: kept for kept in page.evaluate("window.conversations.all()")}


def chosen(page: Page, name: str) -> Locator:
    return page.locator("#chat .option", has_text=name)


def figure(service: Process, name: str) -> float:
    """One of the service's own figures."""
    lines = requests.get(service.url + "/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def wait_for_figure(service: Process, name: str, value: float) -> None:
    """Ask until a figure has this value; it fails after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if figure(service, name) == value:
            return
    raise AssertionError(f"{name} is {figure(service, name)}, not {value}")


@contextmanager
def both_places_taken(service: Process) -> Iterator[None]:
    client = StreamClient(service.url)
    busy = [client.stream(ASK, min_new_tokens=1500, max_new_tokens=1500) for _ in range(2)]
    for stream in busy:
        next(stream)
    yield
    for stream in busy:
        stream.close()


def test_a_reply_is_seen_to_grow(visitor: Any) -> None:
    page = visitor(max_new_tokens=60, temperature=0)
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const text = document.querySelector("#chat .bot-row .message-content")?.innerText;
                if (text && text !== window.seen.at(-1)) window.seen.push(text);
            }).observe(document.querySelector("#chat"), {subtree: true, childList: true,
                characterData: true});
        }"""
    )
    with writing(page):
        send(page, "Write about the sea.")
    expect(meters(page).last).to_contain_text(re.compile("complete|ended at the maximum length"))
    final = answers(page).last.inner_text().strip()
    steps = [text.strip() for text in page.evaluate("window.seen")]
    partial = {text for text in steps if text != final and final.startswith(text)}
    assert len(partial) >= 5, steps
    expect(meters(page).last).to_contain_text("first token after")
    expect(meters(page).last).to_contain_text("tokens/s")
    expect(meters(page).last).to_contain_text(re.compile(r"context \d+ of 2048"))


def test_stop_ends_a_reply_and_keeps_what_had_come(visitor: Any, service: Process) -> None:
    page = visitor(**LONG)
    with writing(page):
        send(page, ASK)
        expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
        page.locator("#box .stop-button").click()
    expect(meters(page).last).to_contain_text("stopped")
    assert answers(page).last.inner_text()
    wait_for_figure(service, "llm_requests_running", 0)
    expect(chosen(page, "Continue")).to_be_visible()


def test_stop_ends_a_reply_before_its_first_word(visitor: Any, service: Process) -> None:
    page = visitor(**SHORT)
    with both_places_taken(service), writing(page):
        send(page, "Never mind.")
        expect(meters(page).last).to_contain_text("Place 1 in the queue")
        page.locator("#box .stop-button").click()
        expect(meters(page).last).to_contain_text("stopped")
    expect(answers(page)).to_have_count(0)


def test_continue_retry_undo_and_edit(visitor: Any) -> None:
    page = visitor(**SHORT)
    with writing(page):
        send(page, "Tell me about rainbows.")
    first = answers(page).inner_text().strip()
    with writing(page):
        chosen(page, "Continue").click()
    assert answers(page).inner_text().startswith(first)
    assert len(answers(page).inner_text()) > len(first)
    with writing(page):
        page.locator("#chat").get_by_role("button", name="Retry").click()
    expect(answers(page)).to_have_text(first)
    with writing(page):
        send(page, "More?")
    expect(answers(page)).to_have_count(2)
    page.locator("#chat").get_by_role("button", name="Edit").first.click()
    page.locator(".edit-textarea").fill("Tell me about <b>cats</b>.")
    with writing(page):
        page.locator("#chat").get_by_role("button", name="Submit").click()
    expect(page.locator("#chat .user-row")).to_have_count(1)
    expect(page.locator("#chat .user-row")).to_contain_text("<\u2060b>cats")
    expect(answers(page)).to_have_count(1)
    page.locator("#chat").get_by_role("button", name="Undo").click()
    expect(page.locator("#box textarea")).to_have_value("Tell me about <b>cats</b>.")
    expect(page.locator("#chat .message-row")).to_have_count(0)


def test_conversations_outlive_a_reload_and_a_restart_of_the_page(
    visitor: Any, address: Process
) -> None:
    page = visitor(**SHORT)
    with writing(page):
        send(page, "Tell me about rainbows.")
    answer = answers(page).inner_text()
    page.reload()
    expect(answers(page)).to_have_text(answer)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    with writing(page):
        send(page, "And cats?")
        halt(page)  # nothing else limits it
    expect(page.locator(".shelf .open")).to_have_text(["And cats?", "Tell me about rainbows."])
    address.kill()
    address.start()
    page.reload()
    expect(page.locator("#chat .user-row")).to_have_text(re.compile("And cats?"))
    page.locator(".shelf .open", has_text="rainbows").click()
    expect(answers(page)).to_have_text(answer)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete: Tell me about rainbows.").click()
    expect(page.locator(".shelf .open")).to_have_text(["And cats?"])
    expect(page.locator("#chat .message-row")).to_have_count(0)


def test_settings_are_kept_with_their_conversation_and_used(visitor: Any) -> None:
    page = visitor(talk(), max_new_tokens=7, temperature=0, system_prompt="Be brief.")
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Maximum tokens")).to_have_value("7")
    page.get_by_label("Maximum tokens").fill("5")
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Seed").blur()
    send(page, "More.")
    expect(meters(page).last).to_contain_text("5 tokens")
    page.locator("#chat summary").last.click()
    used = page.locator("#chat .meter dl").last
    expect(used).to_contain_text("max_new_tokens5")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Maximum tokens")).to_have_value("5")
    expect(page.get_by_label("Seed")).to_have_value("11")


def test_a_message_that_is_sent_before_the_settings_are_shown_goes_with_them(visitor: Any) -> None:
    page = visitor(talk(), max_new_tokens=5, temperature=0)
    page.add_init_script(
        """addEventListener("DOMContentLoaded", () => {
            new MutationObserver((_, observer) => {
                const text = document.querySelector("#box textarea");
                if (!text || !window.lane) return;
                observer.disconnect();
                text.value = "Early.";
                text.dispatchEvent(new Event("input"));
                const enter = { key: "Enter", bubbles: true };
                text.dispatchEvent(new KeyboardEvent("keypress", enter));
            }).observe(document.body, { childList: true, subtree: true });
        })"""
    )
    page.reload()
    page.locator("#chat summary").last.click()
    expect(page.locator("#chat .meter dl").last).to_contain_text("max_new_tokens5")
    expect(page.locator("#chat .user-row")).to_have_text(["What is the sea?", "Early."])


def test_numbers_out_of_bounds_are_said_and_become_the_nearest(visitor: Any) -> None:
    page = visitor(**SHORT)
    page.get_by_role("button", name="Settings").click()
    typed = {"Maximum tokens": ("99999", "2048"), "Seed": ("-5", "0")}
    typed |= {"number input for Temperature": ("9", "5"), "number input for Min-p": ("", "0")}
    for label, (wrong, right) in typed.items():
        field = page.get_by_label(label)
        with settling(page, events=1):
            field.fill(wrong)
            field.blur()
        expect(field).to_have_value(right)
    between = ["Between 0 and 5", "Between 0 and 1", "Between 1 and 2048"]
    expect(page.locator("#right .between")).to_have_text([*between, re.compile("Between 0 and 9")])
    expect(page.locator(".toast-body")).to_have_count(0)
    page.get_by_label("Maximum tokens").fill("5")
    send(page, "Hello.")
    page.locator("#chat summary").click()
    expect(page.locator("#chat .meter dl")).to_contain_text("temperature5")


def test_a_preset_is_its_text_and_a_conversation_has_its_own(visitor: Any) -> None:
    page = visitor(**SHORT)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Preset").click()
    with settling(page, events=1):
        page.get_by_role("option", name="Brief").click()
    expect(page.get_by_label("System prompt")).to_have_value(re.compile("as few words"))
    with writing(page):
        send(page, "Hello.")
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_label("System prompt")).to_have_value("")
    expect(page.get_by_label("Preset")).to_have_value("None")
    page.locator(".shelf .open").click()
    expect(page.get_by_label("System prompt")).to_have_value(re.compile("as few words"))
    expect(page.get_by_label("Preset")).to_have_value("Brief")


def test_a_slider_moved_by_keys_is_kept(visitor: Any) -> None:
    page = visitor(talk(), **SHORT)
    page.get_by_role("button", name="Settings").click()
    with settling(page, events=1):
        page.get_by_label("range slider for Top-p").press("ArrowLeft")
    settings = conversations(page)["What is the sea?"]["settings"]
    assert settings["top_p"] == float(page.get_by_label("number input for Top-p").input_value())


def test_who_scrolls_up_is_left_there_while_the_reply_grows(visitor: Any) -> None:
    page = visitor(talk("The sea is blue.\n\n" * 40), **LONG)
    place = """() => {
        const chat = document.querySelector("#chat [role=log]");
        return [chat.scrollTop, chat.scrollHeight - chat.clientHeight];
    }"""
    with writing(page):
        send(page, ASK)
        expect(answers(page).last).to_contain_text(re.compile(r"\w+ \w+"))
        page.wait_for_function(f"() => (([at, end]) => end > 500 && at > end - 8)(({place})())")
        page.locator("#chat").hover()
        page.mouse.wheel(0, -300)
        page.wait_for_function(f"() => (([at, end]) => at < end - 100)(({place})())")
        top, end = page.evaluate(place)
        page.wait_for_function(f"() => ({place})()[1] > {end}")
        assert page.evaluate(place)[0] <= top
        halt(page)


def test_a_message_without_a_reply_has_a_way_on(visitor: Any) -> None:
    page = visitor([said("user", "What is the sea?")], **SHORT)
    expect(page.locator("#chat .notice")).to_have_text("No reply was kept.")
    with writing(page):
        chosen(page, "Try again").click()
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#chat .notice")).to_have_count(0)


def test_a_conversation_goes_out_and_comes_in_as_a_file(visitor: Any, tmp_path: Path) -> None:
    page = visitor(talk("Blue <b>and</b> wide."))
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save .json").click()
    saved = tmp_path / saving.value.suggested_filename
    saving.value.save_as(saved)
    assert saved.name == "What-is-the-sea.json"
    assert json.loads(saved.read_text())["turns"][1]["content"] == "Blue <b>and</b> wide."
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save .md").click()
    assert "## Assistant\n\nBlue <b>and</b> wide." in saving.value.path().read_text()
    other = visitor()
    other.locator(".shelf input[type=file]").set_input_files(saved)
    expect(answers(other)).to_contain_text("wide.")
    expect(other.locator(".shelf .open")).to_have_text(["What is the sea?"])
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"turns": 3}')
    other.locator(".shelf input[type=file]").set_input_files(wrong)
    expect(other.get_by_text("not a conversation saved by this page")).to_be_visible()
    expect(other.get_by_text("This page made a mistake")).to_have_count(0)
    expect(answers(other)).to_contain_text("wide.")


def test_what_is_written_is_text(visitor: Any) -> None:
    nasty = (
        "<img src='http://127.0.0.1:1/a.png' onerror='window.hit=1'><b>bold</b> <script>x</script>"
        "\n\n"
        "![remote](http://127.0.0.1:1/b.png) ![][r] <form><input></form> <style>*{}</style>\n\n"
        "<details open>x</details>\n\n- ```\n  x\n  ```\n  <u>y</u>\n\n"
        "```mermaid\ngraph TD; A[<img src=x>]-->B\n```\n\n[r]: http://127.0.0.1:1/c.png"
    )
    page = visitor(talk(nasty, question="<i>name</i> <img src=x>"))
    expect(answers(page)).to_contain_text("bold")
    made = "#chat .message-content :is(img, b, i, u, script, style, form, input, details, svg)"
    # The fold of the line of figures is the page's own.
    assert (
        page.locator(f"{made}:not(.meter *)").count()
        == page.locator("#chat .copy_code_button svg").count()
    )
    assert page.locator(".shelf :is(i, img)").count() == 0
    assert page.evaluate("window.hit") is None
    text = answers(page).inner_text().replace("\u2060", "")
    for part in ("<b>bold</b>", "onerror='window.hit=1'", "!remote", "<u>y</u>", "<form>"):
        assert part in text


def test_markdown_code_formulas_and_copying(visitor: Any) -> None:
    raw = "A <b>tag</b>, $x^2$, \\(y\\), $$z$$, $5 and $6.\n\n" + RICH.partition("</think>")[2]
    page = visitor(talk(raw), profile={"permissions": ["clipboard-read", "clipboard-write"]})
    expect(page.locator("#chat .katex")).to_have_count(4)
    expect(page.locator("#chat .katex-display")).to_have_count(1)
    expect(answers(page)).to_contain_text("$5 and $6")
    expect(page.locator("#chat table td")).to_have_text(["1", "2"])
    expect(page.locator("#chat code .token.keyword").first).to_have_text("for")
    assert page.locator("#chat a").get_attribute("rel") == "noopener noreferrer"
    page.locator("#chat .bot-row").first.get_by_role("button", name="Copy message").click()
    assert page.evaluate("navigator.clipboard.readText()") == raw
    page.locator("#chat .copy_code_button").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() in CODE


def test_thinking_is_folded(visitor: Any) -> None:
    page = visitor(talk("<think>\nhidden thoughts\n</think>\n\nThe answer."))
    expect(answers(page)).to_have_text("The answer.")
    expect(page.get_by_text("hidden thoughts")).to_be_hidden()
    page.locator("#chat .thought-group [role=button]").press("Enter")
    expect(page.get_by_text("hidden thoughts")).to_be_visible()


def test_the_token_view_shows_alternatives_and_goes_on_from_one(visitor: Any) -> None:
    page = visitor(**SHORT)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("checkbox", name="Token view").check()
    with writing(page):
        send(page, "Name a colour.")
    tokens = page.locator(".tokens .token")
    expect(tokens).to_have_count(12)
    before = [tokens.nth(i).inner_text() for i in range(2)]
    tokens.nth(2).focus()
    others = page.locator(".tokens .alternatives button")
    expect(others).to_have_count(4)
    other = others.first.locator("code").inner_text().replace("␣", " ")
    with writing(page):
        others.first.click()
    expect(tokens.nth(2)).to_have_text(other)
    assert [tokens.nth(i).inner_text() for i in range(2)] == before
    assert answers(page).inner_text().startswith("".join([*before, other]).strip())
    page.locator("#chat").get_by_role("button", name="Undo").click()
    expect(tokens).to_have_count(0)


def test_a_service_that_is_killed_in_mid_reply_is_said_and_the_text_kept(
    visitor: Any, service: Process
) -> None:
    page = visitor(**LONG)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    service.kill()
    try:
        expect(page.locator("#chat .notice")).to_contain_text("connection to the service was lost")
        text = answers(page).inner_text().strip()
        assert text
        chosen(page, "Continue").click()
        expect(page.locator("#chat .notice")).to_contain_text("is not there")
        assert answers(page).inner_text().strip() == text
    finally:
        service.start()
    with writing(page):
        chosen(page, "Continue").click()
        expect(page.locator("#chat .notice")).to_have_count(0)
        expect(answers(page)).not_to_have_text(text)
        halt(page)
    assert answers(page).inner_text().startswith(text)


def test_two_visitors_do_not_wait_for_each_other(visitor: Any) -> None:
    pages = [visitor(**LONG), visitor(**LONG)]
    for page in pages:
        send(page, ASK)
    for page in pages:
        expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    for page in pages:
        expect(page.locator("#box .stop-button")).to_be_visible()  # neither has ended
        page.locator("#box .stop-button").click()
        expect(page.locator("#box .submit-button")).to_be_visible()


def test_opening_another_conversation_ends_the_reply_in_this_one(
    visitor: Any, service: Process
) -> None:
    page = visitor(**LONG)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    expect(page.locator("#box .submit-button")).to_be_visible()
    wait_for_figure(service, "llm_requests_running", 0)
    with both_places_taken(service):
        send(page, "Never mind.")
        expect(meters(page).last).to_contain_text("Place 1 in the queue")
        page.locator(".shelf .open", has_text=ASK).click()
        expect(page.locator("#chat .user-row")).to_have_text(re.compile(ASK))
        wait_for_figure(service, "llm_requests_waiting", 0)
        assert figure(service, "llm_requests_running") == 2, "the others have not ended"
    expect(page.locator(".shelf .open")).to_have_text(["Never mind.", ASK])
    expect(page.locator("#chat .user-row")).to_have_text(re.compile(ASK))


def test_what_is_begun_in_a_hurry_leaves_all_of_one_piece(visitor: Any) -> None:
    """Whatever order the browser gives a key and a click: no update is drawn over another's."""
    page = visitor(talk(), **SHORT)
    shown = []
    for round in range(8):
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("#chat .message-row")).to_have_count(0)
        page.locator("#box textarea").fill(f"Question {round}?")
        with settling(page, events=2):
            page.keyboard.press("Enter")
            page.evaluate(f"document.querySelectorAll('.shelf .open')[{round}].click()")
        kept = page.evaluate("window.conversations.current.turns.map(turn => turn.content)")
        expect(page.locator("#chat .user-row")).to_have_text([kept[0]])
        assert len(kept) == 2, kept
        expect(answers(page)).to_have_count(1 if kept[1] else 0)
        expect(page.locator(".shelf .open[aria-current]")).to_have_text(kept[0])
        shown.append(kept[0])
    assert len(conversations(page)) == 9, shown


def test_leaving_a_conversation_keeps_all_that_had_come(visitor: Any) -> None:
    page = visitor(talk(), **LONG)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    seen = page.evaluate(
        """() => {
            document.querySelectorAll(".shelf .open")[1].click();
            return document.querySelector("#chat .bot-row .message-content").textContent.trim();
        }"""
    )
    expect(answers(page)).to_have_text("The sea is blue.")
    page.locator(".shelf .open", has_text=ASK).click()
    expect(meters(page)).to_contain_text("stopped")
    assert answers(page).inner_text().startswith(seen[:20])
    assert len(answers(page).inner_text()) >= len(seen)


def test_opening_the_conversation_that_is_written_keeps_all_of_it(visitor: Any) -> None:
    page = visitor(**LONG)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    seen = page.evaluate(
        """() => {
            document.querySelector(".shelf .open").click();
            return document.querySelector("#chat .bot-row .message-content").textContent.trim();
        }"""
    )
    expect(meters(page)).to_contain_text("stopped")
    assert len(answers(page).inner_text()) >= len(seen)


def test_what_is_typed_meanwhile_stays_in_the_box(visitor: Any) -> None:
    page = visitor(**LONG)
    text = page.locator("#box textarea")
    with writing(page):
        text.fill("First.")
        page.keyboard.press("Enter")
        page.keyboard.type("and then")
        expect(page.locator("#box .stop-button")).to_be_visible()
        page.keyboard.press("Enter")  # which sends nothing while a reply is written
        expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
        expect(text).to_have_value("and then")
        halt(page)
    page.reload()
    expect(text).to_have_value("and then")
    with writing(page):
        page.locator("#chat").get_by_role("button", name="Retry").click()
        halt(page)
    expect(text).to_have_value("and then")
    expect(page.locator("#chat .user-row")).to_have_text(["First."])
    with writing(page):
        text.focus()
        page.keyboard.press("Enter")
        halt(page)
    expect(page.locator("#chat .user-row")).to_have_text(["First.", "and then"])
    page.reload()
    expect(page.locator("#chat .user-row")).to_have_count(2)
    expect(text).to_have_value("")


def test_settings_that_change_while_a_reply_is_written_are_kept_with_all_of_it(
    visitor: Any,
) -> None:
    page = visitor(max_new_tokens=60, temperature=0)
    page.get_by_role("button", name="Settings").click()
    with settling(page, events=2):
        send(page, ASK)
        expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
        page.get_by_label("Seed").fill("11")
        page.get_by_label("Seed").blur()
    answer = answers(page).inner_text()
    assert conversations(page)[ASK]["settings"]["seed"] == 11
    page.reload()
    expect(answers(page)).to_have_text(answer)
    expect(meters(page)).to_contain_text("60 tokens")


def test_settings_stay_with_the_conversation_that_was_open(visitor: Any) -> None:
    page = visitor(talk(), **SHORT)
    with writing(page):
        send(page, "More.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("11")
    with settling(page, events=2):
        page.get_by_role("button", name="New conversation").click()  # which takes the focus away
    expect(page.locator("#chat .message-row")).to_have_count(0)
    assert page.evaluate("window.conversations.current.turns.length") == 0
    assert conversations(page)["What is the sea?"]["settings"]["seed"] == 11
    assert len(conversations(page)["What is the sea?"]["turns"]) == 4


def test_a_conversation_that_is_deleted_while_it_is_written_stays_away(visitor: Any) -> None:
    page = visitor(talk(), **LONG)
    page.on("dialog", lambda dialog: dialog.accept())
    send(page, "More.")
    expect(answers(page)).to_have_count(2)
    with settling(page, events=1):
        page.get_by_role("button", name="Delete: What is the sea?").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    assert conversations(page) == {}
    expect(page.locator(".shelf .open")).to_have_count(0)


def test_what_is_deleted_is_what_was_asked_for_then(visitor: Any) -> None:
    page = visitor(talk(), **LONG)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    with settling(page, events=2):
        page.evaluate(
            """() => {
                document.querySelectorAll(".shelf .delete")[0].click();
                document.querySelectorAll(".shelf .open")[1].click();
            }"""
        )
    expect(answers(page)).to_have_text("The sea is blue.")
    assert set(conversations(page)) == {"What is the sea?"}


def test_an_event_that_fails_holds_up_nothing(visitor: Any) -> None:
    page = visitor(talk(), **SHORT)
    page.evaluate("window.conversations.current.turns = []")  # so that no message can be edited
    page.locator("#chat").get_by_role("button", name="Edit").click()
    page.locator("#chat").get_by_role("button", name="Submit").click()
    expect(page.get_by_text("This page made a mistake")).to_be_visible()
    expect(page.locator("#chat .message-row")).to_have_count(0)  # what is kept, and no more
    with writing(page):
        send(page, "More.")
    expect(answers(page)).to_have_count(1)


def test_closing_the_page_ends_the_reply(visitor: Any, service: Process) -> None:
    page = visitor(**LONG)
    aborted = figure(service, 'llm_replies_total{finish_reason="abort"}')
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    page.context.close()
    wait_for_figure(service, 'llm_replies_total{finish_reason="abort"}', aborted + 1)
    wait_for_figure(service, "llm_requests_running", 0)


def test_two_tabs_keep_each_others_conversations(visitor: Any) -> None:
    page = visitor(talk())
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#status h1").wait_for()
    with writing(other):
        send(other, "Hello there.")
    expect(page.locator(".shelf .open")).to_have_text(["Hello there.", "What is the sea?"])
    with writing(page):
        send(page, "More.")
    expect(other.locator(".shelf .open")).to_have_text(["What is the sea?", "Hello there."])


def two_tabs(visitor: Callable[..., Page]) -> tuple[Page, Page]:
    """Two tabs of one browser that show the same conversation."""
    page = visitor(talk(), **SHORT)
    other = page.context.new_page()
    (kept,) = conversations(page).values()
    other.add_init_script(f"sessionStorage.setItem('llm-chat-open', '{kept['id']}')")
    other.goto(page.url)
    expect(answers(other)).to_have_count(1)
    return page, other


def test_two_tabs_on_one_conversation_show_and_keep_the_same(visitor: Any) -> None:
    page, other = two_tabs(visitor)
    with writing(page):
        send(page, "More.")
    expect(answers(other)).to_have_text(answers(page).all_inner_texts())
    other.get_by_role("button", name="Settings").click()
    other.get_by_label("Seed").focus()
    with settling(other, events=1):
        other.get_by_label("Seed").blur()
    with writing(other):
        send(other, "And more.")
    expect(answers(page)).to_have_text(answers(other).all_inner_texts())
    assert len(conversations(page)["What is the sea?"]["turns"]) == 6


def test_a_setting_of_one_tab_is_the_others_too(visitor: Any) -> None:
    page, other = two_tabs(visitor)
    for tab in (page, other):
        tab.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("11")
    page.get_by_label("Seed").blur()
    expect(other.get_by_label("Seed")).to_have_value("11")
    with writing(other):
        send(other, "More.")
    expect(page.get_by_label("Seed")).to_have_value("11")
    assert conversations(page)["What is the sea?"]["settings"]["seed"] == 11


def test_a_busy_tab_shows_afterwards_what_another_has_written(visitor: Any) -> None:
    page, other = two_tabs(visitor)
    other.evaluate("window.lane.enter(null, false)")
    with writing(page):
        send(page, "More.")
    expect(answers(page)).to_have_count(2)
    other.wait_for_function(
        "window.conversations.newest(window.conversations.current.id).turns.length === 4"
    )
    expect(answers(other)).to_have_count(1)
    other.evaluate("window.lane.leave()")
    expect(answers(other)).to_have_text(answers(page).all_inner_texts())


def test_a_storage_that_is_full_is_said(visitor: Any) -> None:
    page = visitor()
    page.evaluate(
        """() => {
            for (let size = 2 ** 22; size >= 1; ) {
                try {
                    localStorage.setItem(`filler-${localStorage.length}`, "x".repeat(size));
                } catch {
                    size /= 2;
                }
            }
        }"""
    )
    with writing(page):
        send(page, ASK)
    expect(page.locator(".shelf [role=status]")).to_contain_text("storage is full")
    expect(answers(page)).not_to_be_empty()


@pytest.mark.parametrize("language", ["zh-CN", "zh-TW"])
def test_the_page_speaks_the_browsers_language(visitor: Any, language: str) -> None:
    page = visitor(profile={"locale": language})
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    assert page.locator("html").get_attribute("lang") == "zh"
    expect(page.get_by_placeholder("输入消息")).to_be_visible()
    with writing(page):
        send(page, "你好")
    expect(meters(page).last).to_contain_text("提示")
    expect(page.locator("#status")).to_contain_text("上下文")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_systems_light_or_dark(visitor: Any, scheme: str) -> None:
    page = visitor(talk(), profile={"color_scheme": scheme})
    colours = "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    text, ground = answers(page).locator("p").evaluate(colours)
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (text, ground)]
    assert brightness[0] < 0.4 < 0.9 < brightness[1] or scheme == "dark"
    assert brightness[1] < 0.2 < 0.7 < brightness[0] or scheme == "light"


def test_a_phone_is_wide_enough(visitor: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = visitor(talk(RICH), profile=phone, **SHORT)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#box textarea")).to_be_in_viewport()
    page.locator("#box textarea").tap()
    with writing(page):
        send(page, "Hello.")
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Conversations").tap()
    expect(page.locator(".shelf .open").first).to_be_in_viewport()
    page.get_by_role("button", name="New conversation").tap()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    expect(page.locator(".shelf .open").first).not_to_be_in_viewport()


def test_a_token_that_is_tapped_shows_its_alternatives(visitor: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = visitor(profile=phone, **SHORT)
    page.get_by_role("button", name="Settings").tap()
    page.get_by_role("checkbox", name="Token view").tap()
    page.get_by_role("button", name="Settings").tap()
    with writing(page):
        send(page, "Name a colour.")
    page.locator(".tokens .token").nth(2).tap()
    expect(page.locator(".tokens .alternatives")).to_have_count(1)
    page.locator("#status").tap()
    expect(page.locator(".tokens .alternatives")).to_have_count(0)


def test_the_keyboard_is_enough(visitor: Any) -> None:
    page = visitor(**SHORT)
    page.locator("#box textarea").focus()
    with writing(page):
        page.keyboard.type("Hello.")
        page.keyboard.press("Enter")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name = (
            "document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"
        )
        reached.add((page.evaluate(name) or "").strip())
    assert {"New conversation", "Hello.", "Copy message", "Edit", "Retry", "Undo"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visitor: Any, scheme: str) -> None:
    turns = [*talk(RICH), *talk("cut", question="go on")]
    turns[-1] |= {"problem": "The service is not there.", "figures": {"finish_reason": "length"}}
    page = visitor(turns, profile={"color_scheme": scheme, "reduced_motion": "reduce"})
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("checkbox", name="Token view").check()
    page.locator("#chat summary").first.click()
    expect(page.get_by_label("System prompt")).to_be_in_viewport()
    found = serious(page)
    page.locator("#chat").get_by_role("button", name="Edit").first.click()
    expect(page.locator(".edit-textarea")).to_be_visible()
    assert found + serious(page) == []


def serious(page: Page) -> list[str]:
    violations = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]} {node['any'][:1]}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]

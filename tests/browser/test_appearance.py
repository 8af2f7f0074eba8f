"""The page's appearance: Markdown, languages, colours, small screens, accessibility."""

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from support.pages import (
    CODE,
    IN_A_BROWSER,
    RICH,
    SHORT,
    answers,
    meters,
    send,
    talk,
    writing,
)

pytestmark = IN_A_BROWSER


def test_markup_in_a_message_is_shown_as_text(visitor: Any) -> None:
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
    # The page's own line of figures contains such elements, too, so it is excluded.
    assert (
        page.locator(f"{made}:not(.meter *)").count()
        == page.locator("#chat .copy_code_button svg").count()
    )
    assert page.locator(".conversation-list :is(i, img)").count() == 0
    assert page.evaluate("window.hit") is None
    text = answers(page).inner_text().replace("\u2060", "")
    for part in ("<b>bold</b>", "onerror='window.hit=1'", "!remote", "<u>y</u>", "<form>"):
        assert part in text


def test_markdown_code_and_formulas_are_rendered_and_can_be_copied(visitor: Any) -> None:
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


def test_the_thinking_of_a_reply_is_folded(visitor: Any) -> None:
    page = visitor(talk("<think>\nhidden thoughts\n</think>\n\nThe answer."))
    expect(answers(page)).to_have_text("The answer.")
    expect(page.get_by_text("hidden thoughts")).to_be_hidden()
    page.locator("#chat .thought-group [role=button]").press("Enter")
    expect(page.get_by_text("hidden thoughts")).to_be_visible()


@pytest.mark.parametrize("language", ["zh-CN", "zh-TW"])
def test_the_page_uses_the_browsers_language(visitor: Any, language: str) -> None:
    page = visitor(profile={"locale": language})
    expect(page.get_by_role("button", name="新对话")).to_be_visible()
    assert page.locator("html").get_attribute("lang") == "zh"
    expect(page.get_by_placeholder("输入消息")).to_be_visible()
    with writing(page):
        send(page, "你好")
    expect(meters(page).last).to_contain_text("提示")
    expect(page.locator("#status")).to_contain_text("上下文")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_systems_colour_scheme(visitor: Any, scheme: str) -> None:
    page = visitor(talk(), profile={"color_scheme": scheme})
    colours = "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
    text, ground = answers(page).locator("p").evaluate(colours)
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (text, ground)]
    assert brightness[0] < 0.4 < 0.9 < brightness[1] or scheme == "dark"
    assert brightness[1] < 0.2 < 0.7 < brightness[0] or scheme == "light"


def test_the_page_fits_on_a_phones_screen(visitor: Any) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = visitor(talk(RICH), profile=phone, **SHORT)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#box textarea")).to_be_in_viewport()
    page.locator("#box textarea").tap()
    with writing(page):
        send(page, "Hello.")
    expect(answers(page)).to_have_count(2)
    page.get_by_role("button", name="Conversations").tap()
    expect(page.locator(".conversation-list .open").first).to_be_in_viewport()
    page.get_by_role("button", name="New conversation").tap()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    expect(page.locator(".conversation-list .open").first).not_to_be_in_viewport()


def test_tapping_a_token_shows_its_alternatives(visitor: Any) -> None:
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


def test_the_keyboard_reaches_every_control(visitor: Any) -> None:
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
def test_axe_finds_no_serious_accessibility_violation(visitor: Any, scheme: str) -> None:
    turns = [*talk(RICH), *talk("cut", question="go on")]
    turns[-1] |= {"problem": "Cannot reach the service.", "figures": {"finish_reason": "length"}}
    page = visitor(turns, profile={"color_scheme": scheme, "reduced_motion": "reduce"})
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("checkbox", name="Token view").check()
    page.locator("#chat summary").first.click()
    expect(page.get_by_label("System prompt")).to_be_in_viewport()
    found = serious_violations(page)
    page.locator("#chat").get_by_role("button", name="Edit").first.click()
    expect(page.locator(".edit-textarea")).to_be_visible()
    assert found + serious_violations(page) == []


def serious_violations(page: Page) -> list[str]:
    violations = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:200]} {node['any'][:1]}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]

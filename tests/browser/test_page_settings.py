"""Settings in the browser: shown, bounded, used, and kept with their conversation."""

import re
from typing import Any

from playwright.sync_api import expect
from support.pages import (
    ASK,
    IN_A_BROWSER,
    SHORT,
    answers,
    conversations,
    meters,
    send,
    settling,
    talk,
    writing,
)

pytestmark = IN_A_BROWSER


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


def test_a_message_sent_before_the_settings_are_shown_uses_them(visitor: Any) -> None:
    page = visitor(talk(), max_new_tokens=5, temperature=0)
    page.add_init_script(
        """addEventListener("DOMContentLoaded", () => {
            new MutationObserver((_, observer) => {
                const text = document.querySelector("#box textarea");
                if (!text || !window.eventQueue) return;
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


def test_a_number_out_of_bounds_is_reported_and_corrected(visitor: Any) -> None:
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
    between = ["Allowed range: 0 to 5", "Allowed range: 0 to 1", "Allowed range: 1 to 2048"]
    expect(page.locator("#right .between")).to_have_text(
        [*between, re.compile("Allowed range: 0 to 9")]
    )
    expect(page.locator(".toast-body")).to_have_count(0)
    page.get_by_label("Maximum tokens").fill("5")
    send(page, "Hello.")
    page.locator("#chat summary").click()
    expect(page.locator("#chat .meter dl")).to_contain_text("temperature5")


def test_each_conversation_keeps_its_own_preset(visitor: Any) -> None:
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
    page.locator(".conversation-list .open").click()
    expect(page.get_by_label("System prompt")).to_have_value(re.compile("as few words"))
    expect(page.get_by_label("Preset")).to_have_value("Brief")


def test_a_slider_value_set_by_the_keyboard_is_kept(visitor: Any) -> None:
    page = visitor(talk(), **SHORT)
    page.get_by_role("button", name="Settings").click()
    with settling(page, events=1):
        page.get_by_label("range slider for Top-p").press("ArrowLeft")
    settings = conversations(page)["What is the sea?"]["settings"]
    assert settings["top_p"] == float(page.get_by_label("number input for Top-p").input_value())


def test_settings_changed_during_a_reply_are_kept_with_the_reply(visitor: Any) -> None:
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
        page.get_by_role("button", name="New conversation").click()  # moves the focus away
    expect(page.locator("#chat .message-row")).to_have_count(0)
    assert page.evaluate("window.conversations.current.turns.length") == 0
    assert conversations(page)["What is the sea?"]["settings"]["seed"] == 11
    assert len(conversations(page)["What is the sea?"]["turns"]) == 4

"""Several tabs of one browser show and keep the same conversations."""

from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page, expect
from support.pages import IN_A_BROWSER, SHORT, answers, conversations, send, settling, talk, writing

pytestmark = IN_A_BROWSER


def test_two_tabs_keep_each_others_conversations(visitor: Any) -> None:
    page = visitor(talk())
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#status h1").wait_for()
    with writing(other):
        send(other, "Hello there.")
    expect(page.locator(".conversation-list .open")).to_have_text(
        ["Hello there.", "What is the sea?"]
    )
    with writing(page):
        send(page, "More.")
    expect(other.locator(".conversation-list .open")).to_have_text(
        ["What is the sea?", "Hello there."]
    )


def two_tabs(visitor: Callable[..., Page]) -> tuple[Page, Page]:
    """Two tabs of one browser that show the same conversation."""
    page = visitor(talk(), **SHORT)
    other = page.context.new_page()
    (kept,) = conversations(page).values()
    other.add_init_script(f"sessionStorage.setItem('llm-chat-open', '{kept['id']}')")
    other.goto(page.url)
    expect(answers(other)).to_have_count(1)
    return page, other


def test_two_tabs_on_one_conversation_show_and_keep_the_same_turns(visitor: Any) -> None:
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


def test_a_setting_changed_in_one_tab_changes_in_the_other(visitor: Any) -> None:
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


def test_a_busy_tab_later_shows_the_turns_written_in_another_tab(visitor: Any) -> None:
    page, other = two_tabs(visitor)
    other.evaluate("window.eventQueue.enter(null, false)")
    with writing(page):
        send(page, "More.")
    expect(answers(page)).to_have_count(2)
    other.wait_for_function(
        "window.conversations.newest(window.conversations.current.id).turns.length === 4"
    )
    expect(answers(other)).to_have_count(1)
    other.evaluate("window.eventQueue.leave()")
    expect(answers(other)).to_have_text(answers(page).all_inner_texts())

"""Conversations in the browser: kept, opened, left, deleted and saved."""

import json
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import expect
from support.pages import (
    ASK,
    IN_A_BROWSER,
    LONG,
    SHORT,
    answers,
    both_slots_busy,
    conversations,
    figure,
    halt,
    meters,
    send,
    settling,
    talk,
    writing,
)
from support.processes import Process
from support.waiting import wait_for

pytestmark = IN_A_BROWSER


def test_conversations_outlive_a_reload_and_a_restart_of_the_page(
    visitor: Any, page_process: Process
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
        halt(page)  # this reply has no token limit
    expect(page.locator(".conversation-list .open")).to_have_text(
        ["And cats?", "Tell me about rainbows."]
    )
    page_process.kill()
    page_process.start()
    page.reload()
    expect(page.locator("#chat .user-row")).to_have_text(re.compile("And cats?"))
    page.locator(".conversation-list .open", has_text="rainbows").click()
    expect(answers(page)).to_have_text(answer)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete: Tell me about rainbows.").click()
    expect(page.locator(".conversation-list .open")).to_have_text(["And cats?"])
    expect(page.locator("#chat .message-row")).to_have_count(0)


def test_a_conversation_can_be_saved_to_a_file_and_loaded_from_it(
    visitor: Any, tmp_path: Path
) -> None:
    page = visitor(talk("Blue <b>and</b> wide."))
    with page.expect_download() as saving:
        page.get_by_role("button", name="Export .json").click()
    saved = tmp_path / saving.value.suggested_filename
    saving.value.save_as(saved)
    assert saved.name == "What-is-the-sea.json"
    assert json.loads(saved.read_text())["turns"][1]["content"] == "Blue <b>and</b> wide."
    with page.expect_download() as saving:
        page.get_by_role("button", name="Export .md").click()
    assert "## Assistant\n\nBlue <b>and</b> wide." in saving.value.path().read_text()
    other = visitor()
    other.locator(".conversation-list input[type=file]").set_input_files(saved)
    expect(answers(other)).to_contain_text("wide.")
    expect(other.locator(".conversation-list .open")).to_have_text(["What is the sea?"])
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"turns": 3}')
    other.locator(".conversation-list input[type=file]").set_input_files(wrong)
    expect(other.get_by_text("not a conversation that this page exported")).to_be_visible()
    expect(other.get_by_text("Something went wrong on this page")).to_have_count(0)
    expect(answers(other)).to_contain_text("wide.")


def test_opening_another_conversation_ends_the_reply_of_the_first(
    visitor: Any, service: Process
) -> None:
    page = visitor(**LONG)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    expect(page.locator("#box .submit-button")).to_be_visible()
    wait_for(lambda: figure(service, "llm_requests_running") == 0)
    with both_slots_busy(service):
        send(page, "Never mind.")
        expect(meters(page).last).to_contain_text("Position 1 in the queue")
        page.locator(".conversation-list .open", has_text=ASK).click()
        expect(page.locator("#chat .user-row")).to_have_text(re.compile(ASK))
        wait_for(lambda: figure(service, "llm_requests_waiting") == 0)
        assert figure(service, "llm_requests_running") == 2, "the two other requests still run"
    expect(page.locator(".conversation-list .open")).to_have_text(["Never mind.", ASK])
    expect(page.locator("#chat .user-row")).to_have_text(re.compile(ASK))


def test_events_in_quick_succession_leave_the_page_consistent(visitor: Any) -> None:
    """In whatever order the browser handles a key and a click, no update overwrites another."""
    page = visitor(talk(), **SHORT)
    shown = []
    for round in range(8):
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("#chat .message-row")).to_have_count(0)
        page.locator("#box textarea").fill(f"Question {round}?")
        with settling(page, events=2):
            page.keyboard.press("Enter")
            page.evaluate(f"document.querySelectorAll('.conversation-list .open')[{round}].click()")
        kept = page.evaluate("window.conversations.current.turns.map(turn => turn.content)")
        expect(page.locator("#chat .user-row")).to_have_text([kept[0]])
        assert len(kept) == 2, kept
        expect(answers(page)).to_have_count(1 if kept[1] else 0)
        expect(page.locator(".conversation-list .open[aria-current]")).to_have_text(kept[0])
        shown.append(kept[0])
    assert len(conversations(page)) == 9, shown


def test_leaving_a_conversation_keeps_the_text_of_its_reply(visitor: Any) -> None:
    page = visitor(talk(), **LONG)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    seen = page.evaluate(
        """() => {
            document.querySelectorAll(".conversation-list .open")[1].click();
            return document.querySelector("#chat .bot-row .message-content").textContent.trim();
        }"""
    )
    expect(answers(page)).to_have_text("The sea is blue.")
    page.locator(".conversation-list .open", has_text=ASK).click()
    expect(meters(page)).to_contain_text("stopped")
    assert answers(page).inner_text().startswith(seen[:20])
    assert len(answers(page).inner_text()) >= len(seen)


def test_opening_a_conversation_again_during_its_reply_keeps_the_text(visitor: Any) -> None:
    page = visitor(**LONG)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    seen = page.evaluate(
        """() => {
            document.querySelector(".conversation-list .open").click();
            return document.querySelector("#chat .bot-row .message-content").textContent.trim();
        }"""
    )
    expect(meters(page)).to_contain_text("stopped")
    assert len(answers(page).inner_text()) >= len(seen)


def test_text_typed_during_a_reply_stays_in_the_input_box(visitor: Any) -> None:
    page = visitor(**LONG)
    text = page.locator("#box textarea")
    with writing(page):
        text.fill("First.")
        page.keyboard.press("Enter")
        page.keyboard.type("and then")
        expect(page.locator("#box .stop-button")).to_be_visible()
        page.keyboard.press("Enter")  # sends nothing during a reply
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


def test_a_conversation_that_is_deleted_during_its_reply_does_not_come_back(visitor: Any) -> None:
    page = visitor(talk(), **LONG)
    page.on("dialog", lambda dialog: dialog.accept())
    send(page, "More.")
    expect(answers(page)).to_have_count(2)
    with settling(page, events=1):
        page.get_by_role("button", name="Delete: What is the sea?").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    assert conversations(page) == {}
    expect(page.locator(".conversation-list .open")).to_have_count(0)


def test_delete_removes_the_conversation_that_was_chosen(visitor: Any) -> None:
    page = visitor(talk(), **LONG)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat .message-row")).to_have_count(0)
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    with settling(page, events=2):
        page.evaluate(
            """() => {
                document.querySelectorAll(".conversation-list .delete")[0].click();
                document.querySelectorAll(".conversation-list .open")[1].click();
            }"""
        )
    expect(answers(page)).to_have_text("The sea is blue.")
    assert set(conversations(page)) == {"What is the sea?"}


def test_the_page_reports_a_full_storage(visitor: Any) -> None:
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
    expect(page.locator(".conversation-list [role=status]")).to_contain_text("storage is full")
    expect(answers(page)).not_to_be_empty()

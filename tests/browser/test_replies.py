"""Replies in the browser: they grow, stop, continue, and survive failures."""

import re
from typing import Any

from playwright.sync_api import expect
from support.pages import (
    ASK,
    IN_A_BROWSER,
    LONG,
    SHORT,
    answers,
    both_slots_busy,
    chosen,
    figure,
    halt,
    meters,
    said,
    send,
    talk,
    writing,
)
from support.processes import Process
from support.waiting import wait_for

pytestmark = IN_A_BROWSER


def test_a_reply_grows_on_the_page(visitor: Any) -> None:
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
    expect(meters(page).last).to_contain_text(re.compile("complete|reached the length limit"))
    final = answers(page).last.inner_text().strip()
    steps = [text.strip() for text in page.evaluate("window.seen")]
    partial = {text for text in steps if text != final and final.startswith(text)}
    assert len(partial) >= 5, steps
    expect(meters(page).last).to_contain_text("first token after")
    expect(meters(page).last).to_contain_text("tokens/s")
    expect(meters(page).last).to_contain_text(re.compile(r"context \d+ of 2048"))


def test_stop_ends_a_reply_and_keeps_its_text_so_far(visitor: Any, service: Process) -> None:
    page = visitor(**LONG)
    with writing(page):
        send(page, ASK)
        expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
        page.locator("#box .stop-button").click()
    expect(meters(page).last).to_contain_text("stopped")
    assert answers(page).last.inner_text()
    wait_for(lambda: figure(service, "llm_requests_running") == 0)
    expect(chosen(page, "Continue")).to_be_visible()


def test_stop_ends_a_reply_before_its_first_word(visitor: Any, service: Process) -> None:
    page = visitor(**SHORT)
    with both_slots_busy(service), writing(page):
        send(page, "Never mind.")
        expect(meters(page).last).to_contain_text("Position 1 in the queue")
        page.locator("#box .stop-button").click()
        expect(meters(page).last).to_contain_text("stopped")
    expect(answers(page)).to_have_count(0)


def test_a_reply_can_be_continued_retried_undone_and_edited(visitor: Any) -> None:
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


def test_a_growing_reply_does_not_move_a_reader_who_has_scrolled_up(visitor: Any) -> None:
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


def test_a_message_without_a_reply_can_be_tried_again(visitor: Any) -> None:
    page = visitor([said("user", "What is the sea?")], **SHORT)
    expect(page.locator("#chat .notice")).to_have_text("This message has no reply yet.")
    with writing(page):
        chosen(page, "Try again").click()
    expect(answers(page)).to_have_count(1)
    expect(page.locator("#chat .notice")).to_have_count(0)


def test_the_token_view_shows_alternatives_and_continues_from_one(visitor: Any) -> None:
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


def test_the_page_reports_a_killed_service_and_keeps_the_text(
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
        expect(page.locator("#chat .notice")).to_contain_text("Cannot reach the service")
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
        expect(page.locator("#box .stop-button")).to_be_visible()  # neither reply has ended
        page.locator("#box .stop-button").click()
        expect(page.locator("#box .submit-button")).to_be_visible()


def test_closing_the_page_ends_the_reply(visitor: Any, service: Process) -> None:
    page = visitor(**LONG)
    aborted = figure(service, 'llm_replies_total{finish_reason="abort"}')
    send(page, ASK)
    expect(answers(page)).to_contain_text(re.compile(r"\w+ \w+"))
    page.context.close()
    wait_for(lambda: figure(service, 'llm_replies_total{finish_reason="abort"}') == aborted + 1)
    wait_for(lambda: figure(service, "llm_requests_running") == 0)


def test_an_event_that_fails_does_not_block_the_page(visitor: Any) -> None:
    page = visitor(talk(), **SHORT)
    page.evaluate("window.conversations.current.turns = []")  # so that the edit fails
    page.locator("#chat").get_by_role("button", name="Edit").click()
    page.locator("#chat").get_by_role("button", name="Submit").click()
    expect(page.get_by_text("Something went wrong on this page")).to_be_visible()
    expect(page.locator("#chat .message-row")).to_have_count(0)  # only the kept turns: none
    with writing(page):
        send(page, "More.")
    expect(answers(page)).to_have_count(1)

"""Take the README's pictures of the page, with real replies of the demo model in Chromium.

    python tests/screenshots.py        (needs requirements-dev.txt and Chromium)

The pictures are written to docs/images/page-*.png.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser, Page  # noqa: E402
from support.browser import started_chromium, started_page, started_service, visit  # noqa: E402

IMAGES = ROOT / "docs" / "images"
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with started_service() as service, started_page(service) as page, started_chromium() as browser:
        light(browser, page.url)
        dark(browser, page.url)
        phone(browser, page.url)


def light(browser: Browser, address: str) -> None:
    page = visitor(browser, address, DESKTOP)
    ask(page, "Why is the sky blue? Two sentences.")
    page.get_by_role("button", name="New conversation").click()
    page.locator("#chat .placeholder").wait_for()
    ask(page, "Write a Python function that reverses a string, and explain it.")
    page.mouse.move(640, 60)
    save_picture(page, "page-light")


def dark(browser: Browser, address: str) -> None:
    page = visitor(browser, address, DESKTOP | {"color_scheme": "dark"}, max_new_tokens=64)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("checkbox", name="Token view").check()
    ask(page, "What is a rainbow? Answer briefly.")
    page.locator(".tokens .token").nth(8).focus()
    save_picture(page, "page-tokens-dark")


def phone(browser: Browser, address: str) -> None:
    profile = PHONE | {"locale": "zh-CN"}
    page = visitor(browser, address, profile, max_new_tokens=48)
    ask(page, "Say hello to the world.")
    save_picture(page, "page-phone-zh")


def visitor(browser: Browser, address: str, profile: Any, **settings: Any) -> Page:
    context = browser.new_context(**({"locale": "en-US"} | profile))
    return visit(context, address, temperature=0, **settings)


def ask(page: Page, question: str) -> None:
    page.locator("#box textarea").fill(question)
    page.keyboard.press("Enter")
    page.locator("#box .stop-button").wait_for()
    page.locator("#box .submit-button").wait_for()


def save_picture(page: Page, name: str) -> None:
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.screenshot(path=IMAGES / f"{name}.png", animations="disabled")


if __name__ == "__main__":
    main()

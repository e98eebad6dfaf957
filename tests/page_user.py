"""What a person does with the gateway's page in a browser, and what they see there.

Finds everything by the names that a screen reader says. Knows the page's contents; knows nothing about HTTP.
"""

from __future__ import annotations

import re

from chromium import Visit
from playwright.sync_api import Locator, Page, expect


class PageUser:
    """A person in front of a browser in which the page is open."""

    def __init__(self, visit: Visit, page: Page | None = None) -> None:
        """`page`: another tab than the first one."""
        self.visit, self.page = visit, page or visit.page
        self.message = self.page.get_by_role("textbox", name="Message", exact=True)
        self.answers = self.page.locator("article.answer")
        self.messages = self.page.locator("article.user")
        self.alert = self.page.get_by_role("alert")
        self.announcer = self.page.locator("#announcer")

    def button(self, name: str) -> Locator:
        """The visible button with this name. The last one, if every turn has one."""
        return self.page.get_by_role("button", name=name, exact=True).last

    def link(self, name: str) -> Locator:
        return self.page.get_by_role("link", name=name, exact=True)

    def field(self, name: str) -> Locator:
        """The visible control with this label."""
        return self.page.get_by_label(name, exact=True).and_(self.page.locator(":visible"))

    def press(self, name: str) -> None:
        self.touch(self.button(name))

    def follow(self, name: str) -> None:
        self.touch(self.link(name))

    def show(self, view: str) -> None:
        """Follow the link to the view "Chat", "Inputs" or "Usage", which is not shown yet."""
        self.follow(view)
        expect(self.link(view)).to_have_attribute("aria-current", "page")
        # A script moves the focus after the browser has followed the link.
        if view == "Chat":
            expect(self.message).to_be_focused()
        else:
            expect(self.page.get_by_role("heading", name=view, exact=True, level=1)).to_be_focused()

    def touch(self, target: Locator) -> None:
        """Click on something, or tap on it on a phone."""
        if self.visit.screen.is_phone:
            target.tap()
        else:
            target.click()

    def send(self, text: str) -> None:
        self.message.fill(text)
        self.press("Send")

    def paste(self, text: str) -> None:
        """Put a long text into the message's box. Chromium needs minutes to type 10,000 lines into it."""
        self.message.evaluate(
            """(box, text) => {
                box.value = text;
                box.dispatchEvent(new Event("input", { bubbles: true }));
            }""",
            text,
        )

    def ask(self, text: str) -> None:
        """Send a message and wait for the end of the answer."""
        expect(self.button("Send")).to_be_visible()
        before = self.messages.count()
        self.send(text)
        expect(self.messages).to_have_count(before + 1)
        expect(self.button("Send")).to_be_visible()

    @property
    def answer(self) -> Locator:
        """The text of the last answer."""
        return self.answers.last.locator(".answer-text")

    def open_panel(self, name: str) -> None:
        """Show the panel "Chats" or "Settings", which a narrow window hides."""
        toggle = self.page.locator(f"#{name.lower()}-toggle")
        # The page's script sets the attribute when it has started. A click before that would do nothing.
        expect(toggle).to_have_attribute("aria-expanded", re.compile("true|false"))
        if toggle.is_visible() and toggle.get_attribute("aria-expanded") == "false":
            self.touch(toggle)
        expect(self.page.get_by_role("complementary", name=name)).to_be_visible()

    def close_panel(self) -> None:
        """Close the panel if it covers the page."""
        close = self.page.get_by_role("dialog").get_by_role("button", name="Close", exact=True)
        if close.count():
            self.touch(close)

    def chat_titles(self) -> list[str]:
        """The chats that are listed, the last one that was used first."""
        return self.page.locator("#chat-list a").all_text_contents()

    def clipboard(self) -> str:
        """What was copied. Read in a tab of its own: the page's policy does not let it read the clipboard."""
        self.visit.context.grant_permissions(["clipboard-read"], origin=self.visit.url)
        tab = self.visit.context.new_page()
        tab.goto(f"{self.visit.url}/healthz")
        text: str = tab.evaluate("() => navigator.clipboard.readText()")
        tab.close()
        return text

    def focus_is_on(self) -> str:
        """What has the focus: its name, or its tag. "body" means that the focus was lost."""
        name: str = self.page.evaluate(
            """() => {
                const focused = document.activeElement;
                return focused.ariaLabel || focused.id || focused.textContent.trim() || focused.tagName.toLowerCase();
            }"""
        )
        return name

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        pixels: int = self.page.evaluate(
            "() => document.scrollingElement.scrollWidth - document.documentElement.clientWidth"
        )
        return pixels

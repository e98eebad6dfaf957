"""The page for people who use a keyboard or a screen reader, checked by axe and by pressing keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chromium import Screen
from gateways import KEY, Gateway
from node_clients import FOLDER, NodeClients
from page_user import PageUser
from playwright.sync_api import Locator, expect
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script

Users = Callable[..., PageUser]

MARKDOWN = """# Title

A [link](https://example.com/), `code`, **bold**, *emphasis* and ~~struck~~.

```python
print("a long line of code that is wider than a phone's screen and has to be scrolled", 1, 2, 3)
```

> quote

1. one
   - two

| a | b |
|---|--:|
| 1 | 2 |
"""


@pytest.fixture(scope="module")
def axe(node_clients: NodeClients) -> str:
    """The source of axe-core."""
    return (FOLDER / "node_modules" / "axe-core" / "axe.min.js").read_text()


class Audit:
    """Runs axe on what a user sees, in both themes, and collects what it finds."""

    def __init__(self, user: PageUser, source: str) -> None:
        self._user, self._source = user, source
        self.found = list[str]()

    def run(self, state: str) -> None:
        page = self._user.page
        if not page.evaluate("() => 'axe' in window"):
            page.evaluate(self._source)
        page.emulate_media(color_scheme="dark")
        self._run(f"{state}, dark", runOnly=["color-contrast"])
        page.emulate_media(color_scheme="light")
        self._run(f"{state}, light")
        assert page.locator("h1:visible").count() == 1, state
        assert page.evaluate("() => document.documentElement.lang") == "en"

    def _run(self, state: str, **options: Any) -> None:
        page = self._user.page
        page.evaluate("() => Promise.all(document.getAnimations().map((one) => one.finished.catch(() => 0)))")
        results = page.evaluate(
            "(options) => axe.run(document, options)", {"resultTypes": ["violations"], **options}
        )
        for violation in results["violations"]:
            places = [node["target"][-1] for node in violation["nodes"]]
            self.found.append(f"{violation['impact']}: {violation['id']} in {state}: {places}")


def test_axe_finds_nothing(users: Users, gateway: Gateway, cog: FakeCog, axe: str, screen: Screen) -> None:
    user = users(gateway, screen, key=None)
    user.visit.allow_status(401, 404)
    audit = Audit(user, axe)
    user.page.get_by_label("Key").fill("wrong")
    user.press("Log in")
    expect(user.alert).to_be_visible()
    audit.run("login")
    user.page.get_by_label("Key").fill(KEY)
    user.press("Log in")
    expect(user.message).to_be_visible()
    audit.run("empty chat")
    for state in chat_states(user, cog):
        audit.run(state)
    for state in other_states(user, cog):
        audit.run(state)
    assert audit.found == []


def chat_states(user: PageUser, cog: FakeCog) -> Iterator[str]:
    cog.rules.script = Script([MARKDOWN, "more"], hold_after=1)
    user.send("Show everything")
    expect(user.answer.get_by_role("table")).to_be_visible()
    yield "running answer"
    user.press("Stop")
    expect(user.button("Retry")).to_be_visible()
    cog.rules.script = Script([MARKDOWN], logs="formatted prompt: '<s>[INST] Hi [/INST]'\n")
    user.press("Retry")
    expect(user.answers.get_by_label("Measurements")).to_be_visible()
    user.touch(user.answers.get_by_text("Formatted prompt"))
    expect(user.answers.get_by_role("region", name="Formatted prompt")).to_be_visible()
    yield "answer"
    user.press("Edit")
    yield "edited message"
    user.page.keyboard.press("Escape")
    cog.rules.script = Script(["x"], error="E1002 PromptTooLong: too long")
    user.ask("Fail")
    yield "failed answer"
    user.open_panel("Settings")
    user.field("temperature").fill("9")
    yield "settings"
    user.field("temperature").fill("0.5")
    user.close_panel()
    user.open_panel("Chats")
    yield "chats"
    user.close_panel()
    user.press("Delete")
    expect(user.button("Undo")).to_be_visible()
    yield "deleted chat"


def other_states(user: PageUser, cog: FakeCog) -> Iterator[str]:
    user.show("Inputs")
    user.page.get_by_text("Deprecated inputs").click()
    user.field("temperature").fill("9")
    user.press("Run")
    expect(user.field("temperature")).to_be_focused()
    yield "invalid inputs"
    user.press("Reset")
    cog.rules.script = Script(["The answer"])
    user.field("prompt").fill("Hi")
    user.press("Run")
    expect(user.page.locator("#output")).to_contain_text("Succeeded")
    yield "prediction"
    user.page.goto(f"{user.visit.url}/#/predictions/{'a' * 26}")
    expect(user.page.locator("#output")).to_contain_text("no prediction")
    yield "missing prediction"
    user.show("Usage")
    expect(user.page.get_by_role("row")).to_have_count(2)
    yield "usage"


def test_a_keyboard_is_enough_from_the_login_to_the_answer(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(["One", " two", " three"], hold_after=2)
    user = users(gateway, key=None)
    press = user.page.keyboard.press
    expect(user.page.get_by_label("Key")).to_be_focused()
    user.page.keyboard.type(KEY)
    press("Enter")
    expect(user.message).to_be_focused()
    user.page.keyboard.type("Count")
    press("Shift+Enter")
    user.page.keyboard.type("to three")
    press("Enter")
    expect(user.answer).to_have_text("One two")
    assert cog.predictions[0]["messages"][0]["content"] == "Count\nto three"
    expect(user.message).to_be_focused()
    press("Escape")
    expect(user.answers).to_contain_text("The answer was stopped.")
    until(lambda: cog.counts.cancelled == 1)
    expect(user.message).to_be_focused()
    cog.rules.script = Script(["Done"])
    tab_to(user, user.button("Retry"), backwards=True)
    press("Enter")
    expect(user.answer).to_have_text("Done")
    expect(user.button("Stop")).to_be_hidden()
    assert user.focus_is_on() != "body"
    tab_to(user, user.button("Edit"), backwards=True)
    press("Enter")
    expect(user.message).to_be_focused()
    user.page.keyboard.type(" changed")
    press("Enter")
    expect(user.announcer).to_have_text("Answer complete")
    expect(user.message).to_be_focused()


def test_the_buttons_do_not_lose_the_focus(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["One", " two"], hold_after=1)
    user = users(gateway)
    user.message.fill("Count")
    tab_to(user, user.button("Send"))
    user.page.keyboard.press("Enter")
    expect(user.button("Stop")).to_be_focused()
    expect(user.answer).to_have_text("One")
    user.page.keyboard.press("Space")
    expect(user.message).to_be_focused()
    tab_to(user, user.button("Delete"), backwards=True)
    user.page.keyboard.press("Enter")
    expect(user.answers).to_have_count(0)
    assert user.focus_is_on() != "body"


def test_every_stop_of_the_tab_key_is_visible(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = Script([MARKDOWN])
    user = users(gateway, screen)
    user.ask("Show everything")
    seen = list[str]()
    for view in ("Chat", "Inputs", "Usage"):
        if view != "Chat":  # which is shown already
            user.show(view)
        user.page.locator("#skip").focus()
        while True:
            user.page.keyboard.press("Tab")
            name, outline, is_covered = user.page.evaluate(FOCUS)
            if name == "body" or f"{view}: {name}" in seen:
                break
            seen.append(f"{view}: {name}")
            assert outline != "none", f"{seen[-1]} looks the same without the focus"
            assert not is_covered, f"{seen[-1]} is covered"
    assert len(seen) > 40


FOCUS = """() => {
    const focused = document.activeElement;
    if (focused === document.body) return ["body", "", false];
    const { left, top, width, height } = focused.getBoundingClientRect();
    const name = [focused.tagName.toLowerCase(), focused.id, focused.ariaLabel, focused.textContent.slice(0, 40)];
    const seen = document.elementFromPoint(left + width / 2, Math.min(top + height / 2, innerHeight - 1));
    return [name.join(" "), getComputedStyle(focused).outlineStyle, !focused.contains(seen)];
}"""


def tab_to(user: PageUser, target: Locator, *, backwards: bool = False) -> None:
    """Press the Tab key until the target has the focus."""
    for _ in range(60):
        user.page.keyboard.press("Shift+Tab" if backwards else "Tab")
        if target.evaluate("(target) => document.activeElement === target"):
            return
    pytest.fail(f"the Tab key does not reach {target}")

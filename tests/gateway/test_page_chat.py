"""The page's chat in a real browser, against a gateway and a scripted model."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from chromium import DESKTOP, PHONE, Screen
from gateways import KEY, Gateway
from page_user import PageUser
from playwright.sync_api import expect
from server_clients import Body, until

from benchmarks.fake_cog import FakeCog, Script

Users = Callable[..., PageUser]


def echo(inputs: Body) -> Script:
    """Answer with the last message."""
    return Script(["You said: ", inputs["messages"][-1]["content"]])


def test_a_key_logs_in_and_out(users: Users, gateway: Gateway, screen: Screen) -> None:
    user = users(gateway, screen, key=None)
    user.visit.allow_status(401)
    key = user.page.get_by_label("Key")
    expect(key).to_be_focused()
    key.fill("wrong")
    user.press("Log in")
    expect(user.alert).to_contain_text("does not know this key")
    expect(key).to_be_focused()
    assert user.visit.context.cookies() == []
    key.fill(f" {KEY}\n")
    user.press("Log in")
    expect(user.message).to_be_focused()
    (cookie,) = user.visit.context.cookies()
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert KEY not in cookie["value"]
    assert user.page.evaluate("() => document.cookie + JSON.stringify(localStorage)") == "{}"
    user.press("Log out")
    expect(key).to_be_visible()
    expect(user.message).to_be_hidden()
    assert user.visit.context.cookies() == []


def test_an_answer_appears_piece_by_piece(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = Script(["The **capital**", " is", " `Paris`."], hold_after=2)
    user = users(gateway, screen)
    user.send("What is the capital of France?")
    expect(user.messages).to_contain_text("What is the capital of France?")
    expect(user.answer).to_have_text("The capital is")
    expect(user.button("Stop")).to_be_visible()
    expect(user.button("Send")).to_be_hidden()
    cog.release()
    expect(user.answer.locator("code")).to_have_text("Paris")
    expect(user.answer.locator("strong")).to_have_text("capital")
    expect(user.announcer).to_have_text("Answer complete")
    expect(user.button("Send")).to_be_visible()
    expect(user.message).to_have_value("")
    (inputs,) = cog.predictions
    assert inputs["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert user.overflow() == 0


def test_stop_cancels_the_prediction_and_keeps_the_text(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = Script(["One", " two", " three"], hold_after=2)
    user = users(gateway, screen)
    user.send("Count")
    expect(user.answer).to_have_text("One two")
    user.press("Stop")
    expect(user.announcer).to_have_text("Answer stopped")
    until(lambda: cog.counts.cancelled == 1)
    expect(user.answer).to_have_text("One two")
    expect(user.answers).to_contain_text("The answer was stopped.")
    cog.rules.script = Script(["Go on"])
    user.ask("And then?")
    assert [turn["content"] for turn in cog.predictions[-1]["messages"]] == ["Count", "One two", "And then?"]


def test_retry_and_edit_send_the_right_messages(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = echo
    user = users(gateway, screen)
    user.ask("first")
    user.ask("second")
    user.press("Retry")
    until(lambda: len(cog.predictions) == 3)
    assert cog.predictions[2] == cog.predictions[1]
    expect(user.answers).to_have_count(2)
    expect(user.button("Send")).to_be_visible()
    user.message.fill("a draft")
    user.touch(user.messages.first.get_by_role("button", name="Edit"))
    expect(user.message).to_have_value("first")
    expect(user.message).to_be_focused()
    user.send("changed")
    expect(user.messages).to_have_count(1)
    expect(user.answer).to_have_text("You said: changed")
    assert cog.predictions[-1]["messages"] == [{"role": "user", "content": "changed"}]
    expect(user.message).to_have_value("a draft")


def test_an_edit_can_be_given_up(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.ask("first")
    user.message.fill("a draft")
    user.press("Edit")
    expect(user.message).to_have_value("first")
    user.page.keyboard.press("Escape")
    expect(user.message).to_have_value("a draft")
    expect(user.message).to_be_focused()
    expect(user.answers).to_have_count(1)


def test_chats_survive_a_reload_and_can_be_renamed_and_deleted(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = echo
    user = users(gateway, screen)
    user.ask("About cats")
    user.open_panel("Chats")
    user.press("New chat")
    expect(user.messages).to_have_count(0)
    user.ask("About dogs")
    assert cog.predictions[-1]["messages"] == [{"role": "user", "content": "About dogs"}]
    user.page.reload()
    expect(user.answer).to_have_text("You said: About dogs")
    assert user.chat_titles() == ["About dogs", "About cats"]
    user.press("Rename")
    user.page.get_by_role("textbox", name="Title").fill("Fish")
    user.press("Cancel")
    user.press("Rename")
    expect(user.page.get_by_role("textbox", name="Title")).to_have_value("About dogs")
    user.page.get_by_role("textbox", name="Title").fill("Dogs")
    user.press("Save")
    user.open_panel("Chats")
    user.follow("About cats")
    expect(user.answer).to_have_text("You said: About cats")
    assert user.chat_titles() == ["Dogs", "About cats"]
    user.press("Delete")
    expect(user.messages).to_have_count(0)
    assert user.chat_titles() == ["Dogs"]
    user.press("Undo")
    expect(user.answer).to_have_text("You said: About cats")
    user.press("Delete")
    user.show("Usage")
    expect(user.button("Undo")).to_be_hidden()
    user.page.reload()
    user.show("Chat")
    expect(user.message).to_be_visible()
    assert user.chat_titles() == ["Dogs"]


def test_the_system_prompt_and_the_settings_are_sent(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    user = users(gateway, screen)
    user.open_panel("Settings")
    user.field("System prompt").fill("Answer like a pirate.")
    user.field("temperature").fill("0.25")
    user.field("max_new_tokens").fill("17")
    user.close_panel()
    user.ask("Hello")
    sent = cog.predictions[-1]
    assert sent["system_prompt"] == "Answer like a pirate."
    assert (sent["temperature"], sent["max_new_tokens"]) == (0.25, 17)
    assert "top_p" not in sent
    user.page.reload()
    user.open_panel("Settings")
    expect(user.field("temperature")).to_have_value("0.25")
    user.press("Use the defaults")
    user.close_panel()
    user.ask("Hello again")
    assert "temperature" not in cog.predictions[-1]
    assert "helpful" in cog.predictions[-1]["system_prompt"]


def test_a_setting_outside_its_limits_is_not_sent(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    user = users(gateway)
    user.open_panel("Settings")
    temperature = user.field("temperature")
    temperature.fill("9")
    user.send("Hello")
    expect(user.alert).to_contain_text("Correct temperature in Settings")
    expect(temperature).to_have_attribute("aria-invalid", "true")
    expect(user.message).to_have_value("Hello")
    assert cog.predictions == []


def test_a_retry_with_a_setting_outside_its_limits_is_refused(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = users(gateway)
    user.open_panel("Settings")
    temperature = user.field("temperature")
    temperature.fill("0.2")
    user.ask("Hello")
    temperature.fill("99")
    user.press("Retry")
    expect(user.alert).to_contain_text("Correct temperature in Settings")
    expect(temperature).to_have_attribute("aria-invalid", "true")
    temperature.fill("0.3")
    user.press("Retry")
    expect(user.alert).to_have_count(0)
    until(lambda: len(cog.predictions) == 2)
    assert [inputs["temperature"] for inputs in cog.predictions] == [0.2, 0.3]


def test_a_reload_in_the_middle_of_an_answer_goes_on_with_it(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(["One", " two", " three", " four"], hold_after=2)
    user = users(gateway)
    user.send("Count")
    expect(user.answer).to_have_text("One two")
    user.page.reload()
    expect(user.answer).to_have_text("One two")
    expect(user.button("Stop")).to_be_visible()
    cog.release()
    expect(user.answer).to_have_text("One two three four")
    expect(user.button("Send")).to_be_visible()
    assert len(cog.predictions) == 1


def test_an_answer_goes_on_while_another_chat_is_shown(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["One", " two", " three"], hold_after=2)
    user = users(gateway)
    user.send("Count")
    expect(user.answer).to_have_text("One two")
    user.press("New chat")
    cog.rules.script = echo
    user.ask("Meanwhile")
    expect(user.answer).to_have_text("You said: Meanwhile")
    cog.release()
    until(lambda: cog.counts.succeeded == 2)
    user.follow("Count")
    expect(user.answer).to_have_text("One two three")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_theme_of_the_system_can_be_overridden(users: Users, gateway: Gateway, theme: str) -> None:
    def brightness() -> int:
        colour: str = user.page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
        return int(re.findall(r"\d+", colour)[0])

    user = users(gateway, theme=theme)
    system = brightness()
    assert (system > 128) == (theme == "light")
    user.page.get_by_label("Theme").select_option("dark" if theme == "light" else "light")
    assert (brightness() > 128) == (theme == "dark")
    user.page.reload()
    assert (brightness() > 128) == (theme == "dark")
    user.page.get_by_label("Theme").select_option("auto")
    assert brightness() == system


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=lambda size: size.name)
def test_no_view_is_wider_than_the_window(users: Users, gateway: Gateway, size: Screen) -> None:
    user = users(gateway, size)
    user.ask("Hello")
    for name in ("Inputs", "Usage", "Chat"):
        user.show(name)
        assert user.overflow() == 0, name

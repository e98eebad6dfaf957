"""What the page shows when something goes wrong: the model, the gateway, the budget, the login, the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from chromium import Screen
from gateways import KEY, Gateway
from page_user import PageUser
from playwright.sync_api import Route, expect
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script

Users = Callable[..., PageUser]


def test_a_failed_answer_shows_the_code_of_its_error_and_can_be_tried_again(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = Script(["One"], error="E1002 PromptTooLong: the prompt has 5000 tokens")
    user = users(gateway, screen)
    user.ask("Count")
    expect(user.answers).to_contain_text("E1002 PromptTooLong")
    expect(user.answers).to_contain_text("One")
    expect(user.announcer).to_contain_text("The answer failed.")
    cog.rules.script = Script(["One", " two"])
    user.press("Retry")
    expect(user.answer).to_have_text("One two")
    expect(user.answers).not_to_contain_text("E1002")
    assert cog.predictions[1] == cog.predictions[0]
    assert user.overflow() == 0


def test_a_used_up_budget_is_explained_and_the_text_stays(users: Users, gateway: Gateway) -> None:
    key = gateway.add_key("limited", monthly_tokens=5)
    user = users(gateway, key=key)
    user.visit.allow_status(402)
    user.ask("One two three")
    user.send("Once more")
    expect(user.alert).to_contain_text("budget of this key is used up")
    expect(user.message).to_have_value("Once more")
    expect(user.messages).to_have_count(1)
    user.show("Usage")
    expect(user.page.get_by_label("7 of 5 tokens")).to_be_visible()
    expect(user.page.get_by_text("The budget is used up.")).to_be_visible()


def test_a_request_above_the_rate_limit_says_when_to_try_again(users: Users, gateway: Gateway) -> None:
    user = users(gateway, key=gateway.add_key("slow", requests_per_minute=1))
    user.visit.allow_status(429)
    user.ask("Hello")
    user.send("Once more")
    expect(user.alert).to_contain_text("Try again in")
    expect(user.message).to_have_value("Once more")


def test_a_revoked_key_asks_for_another_one_and_keeps_the_text(
    users: Users, gateway: Gateway, screen: Screen
) -> None:
    user = users(gateway, screen, key=gateway.add_key("ann"))
    user.visit.allow_status(401)
    user.ask("Hello")
    gateway.revoke("ann")
    new_key = gateway.add_key("ann")
    user.send("A long text")
    dialog = user.page.get_by_role("dialog")
    expect(dialog.get_by_label("Key")).to_be_focused()
    dialog.get_by_label("Key").fill(new_key)
    user.press("Log in")
    expect(dialog).to_have_count(0)
    expect(user.messages).to_have_count(2)
    expect(user.messages.last).to_contain_text("A long text")


def test_a_person_without_another_key_can_go_on_reading(users: Users, gateway: Gateway) -> None:
    user = users(gateway, key=gateway.add_key("ann"))
    user.visit.allow_status(401)
    user.ask("Hello")
    gateway.revoke("ann")
    user.send("A long text")
    user.press("Not now")
    expect(user.message).to_have_value("A long text")
    expect(user.message).to_be_editable()
    expect(user.answers).to_have_count(1)


def test_the_chats_of_another_key_are_not_shown(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.ask("A private message")
    user.press("Log out")
    user.page.get_by_label("Key").fill(gateway.add_key("ann"))
    user.press("Log in")
    expect(user.message).to_be_visible()
    assert user.chat_titles() == []
    expect(user.page.get_by_role("main")).not_to_contain_text("A private message")
    user.press("Log out")
    user.page.get_by_label("Key").fill(KEY)
    user.press("Log in")
    expect(user.message).to_be_visible()
    assert user.chat_titles() == ["A private message"]


def begin_answer(users: Users, gateway: Gateway, cog: FakeCog) -> PageUser:
    """Return a user who has two of the three pieces of an answer, and who may lose the gateway."""
    cog.rules.script = Script(["One", " two", " three"], hold_after=2)
    user = users(gateway)
    user.visit.allow_lost_connections()
    user.send("Count")
    expect(user.answer).to_have_text("One two")
    return user


def test_a_restart_of_the_gateway_interrupts_the_answer_and_not_the_page(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = begin_answer(users, gateway, cog)
    gateway.restart()
    expect(user.button("Retry")).to_be_visible()
    expect(user.answer).to_have_text("One two")
    expect(user.answers).to_contain_text("The answer failed")
    cog.rules.script = Script(["One", " two", " three"])
    user.press("Retry")
    expect(user.answer).to_have_text("One two three")


def test_two_tabs_do_not_try_again_in_turn(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["One", " two"], hold_after=1)
    user = users(gateway)
    user.visit.allow_status(403)
    user.visit.allow_lost_connections()
    user.send("Count")
    expect(user.answer).to_have_text("One")
    other = PageUser(user.visit, user.visit.context.new_page())
    other.page.goto(user.page.url)
    expect(other.answer).to_have_text("One")
    asked = list[str]()

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        route.fulfill(status=403, json={"title": "Forbidden", "detail": "Not now"})

    user.visit.context.route("**/v1/predictions/*", refuse)
    cog.release()
    for tab in (user, other):
        expect(tab.button("Retry")).to_be_visible()
        expect(tab.answers).to_contain_text("The answer was interrupted")
    user.visit.context.unroute("**/v1/predictions/*")
    other.page.evaluate("() => localStorage.length")
    assert len(asked) <= 4


def test_a_gateway_that_cannot_be_reached_is_explained(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    user = users(gateway)
    user.visit.allow_lost_connections()
    user.ask("Hello")
    user.visit.context.set_offline(True)
    user.send("Once more")
    expect(user.alert).to_contain_text("could not be reached")
    expect(user.message).to_have_value("Once more")
    user.visit.context.set_offline(False)
    user.press("Send")
    expect(user.answers).to_have_count(2)
    expect(user.button("Send")).to_be_visible()
    assert len(cog.predictions) == 2


def test_messages_wait_for_a_model_that_is_starting(users: Users, cog: FakeCog, tmp_path: Path) -> None:
    cog.rules.health = "STARTING"
    with Gateway([cog.url], tmp_path / "gateway.sqlite3") as gateway:
        user = users(gateway)
        user.visit.allow_lost_connections()  # the gateway ends before the page is closed
        user.visit.allow_status(503)  # of /readyz
        expect(user.page.get_by_text("No server of the model has been ready yet")).to_be_visible()
        user.send("Hello")
        expect(user.answers).to_contain_text(re.compile("Waiting for the first token|No server of the model"))
        cog.rules.health = None
        expect(user.answer).to_contain_text("Paris")
        expect(user.page.get_by_text("No server of the model has been ready yet")).to_have_count(0)
        user.open_panel("Settings")
        expect(user.field("temperature")).to_be_visible()


def test_both_views_say_that_no_server_is_ready_any_more(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    unready = "No server of the model is ready. The answer begins when one is."
    cog.rules.script = Script(["One"], hold_after=0)
    user = users(gateway)
    user.visit.allow_status(503)
    user.open_panel("Settings")
    expect(user.field("temperature")).to_be_visible()
    cog.rules.health = "STARTING"
    until(lambda: gateway.client.get("/readyz").status_code == 503)
    user.send("Hello")
    user.show("Inputs")
    user.field("prompt").fill("Hello")
    user.press("Run")
    output = user.page.locator("#output")
    expect(output).to_contain_text(unready)
    expect(user.answers).to_contain_text(unready)
    cog.rules.health = None
    expect(output).to_contain_text("Waiting for the first token")
    expect(output).not_to_contain_text(unready)
    predictions = gateway.client.get("/v1/predictions").json()["results"]
    assert len(predictions) == 2
    for prediction in predictions:
        gateway.wait_for(prediction, "processing")
    cog.release()
    expect(output).to_contain_text("Succeeded")
    user.show("Chat")
    expect(user.answer).to_have_text("One")
    expect(user.answers).not_to_contain_text(unready)


def test_a_chat_that_the_browser_cannot_store_stays_on_the_page(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.page.evaluate("() => localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - 200))")
    user.ask("Hello " + "x" * 500)
    expect(user.alert).to_contain_text("no room to store this chat")
    expect(user.answer).to_contain_text("Paris")


def test_a_gateway_that_is_being_stopped_ends_the_answer_on_the_page(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    """It ends running predictions in their streams, and accepts no more requests."""
    user = begin_answer(users, gateway, cog)
    user.visit.context.route("**/v1/predictions/*", lambda route: route.abort())

    async def stop() -> None:
        gateway.inside.stop_starting()

    gateway.run(stop())
    expect(user.answers).to_contain_text("E4002 GatewayRestarted")
    expect(user.button("Retry")).to_be_visible()
    expect(user.answer).to_have_text("One two")


def test_an_answer_is_complete_although_the_gateway_accepts_no_more_requests(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = begin_answer(users, gateway, cog)
    user.visit.context.route("**/v1/predictions/*", lambda route: route.abort())
    cog.release()
    expect(user.announcer).to_have_text("Answer complete")
    expect(user.answer).to_have_text("One two three")
    expect(user.answers).not_to_contain_text("interrupted")

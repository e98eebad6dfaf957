"""The page when something happens at a bad moment: before a response, during an answer, in another view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gateways import KEY, Gateway
from page_user import PageUser
from playwright.sync_api import Route, expect
from server_clients import until

from benchmarks.fake_cog import FakeCog, Script

Users = Callable[..., PageUser]

MODEL = "**/v1/models/*/*"
CREATE = f"{MODEL}/predictions"


class Held:
    """Requests of the page that wait until `release` is called."""

    def __init__(self, user: PageUser, pattern: str) -> None:
        self._user, self._pattern = user, pattern
        self.routes = list[Route]()
        user.page.route(pattern, self._hold)

    def _hold(self, route: Route) -> None:
        self.routes.append(route)

    def wait(self, count: int = 1) -> None:
        """Wait until this many requests are held."""
        for _ in range(1000):
            if len(self.routes) >= count:
                return
            self._user.page.wait_for_timeout(10)  # Playwright reports requests only while it waits
        pytest.fail(f"the page has sent {len(self.routes)} requests for {self._pattern}, not {count}")

    def release(self, index: int = 0) -> None:
        """Let one request go on, and hold no more of them."""
        self.routes[index].continue_()
        self._user.page.unroute(self._pattern)


def test_stop_before_the_prediction_is_created_cancels_it(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(["One", " two"], hold_after=1)
    user = users(gateway)
    creating = Held(user, CREATE)
    user.send("Count")
    creating.wait()
    user.press("Stop")
    creating.release()
    expect(user.answers).to_contain_text("The answer was stopped.")
    assert gateway.client.get("/v1/predictions").json()["results"][0]["status"] == "canceled"


def test_a_message_that_is_being_sent_is_not_sent_to_another_chat(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = users(gateway)
    user.ask("First")
    creating = Held(user, CREATE)
    user.send("Second")
    creating.wait()
    user.press("New chat")
    expect(user.messages).to_have_count(0)
    user.press("Send")
    creating.release()
    expect(user.message).to_have_value("")
    expect(user.messages).to_have_count(0)
    until(lambda: cog.counts.succeeded == 2)
    assert [len(inputs["messages"]) for inputs in cog.predictions] == [1, 3]


def test_a_refusal_is_shown_although_another_chat_is_open(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.visit.allow_status(503)
    user.ask("First")
    creating = Held(user, CREATE)
    user.send("Second")
    creating.wait()
    user.press("New chat")
    creating.routes[0].fulfill(status=503, json={"title": "Busy", "detail": "Try later"})
    expect(user.alert).to_contain_text("Try later")
    expect(user.message).to_have_value("Second")
    expect(user.message).to_be_editable()


def test_pieces_that_are_sent_again_after_a_reconnect_are_shown_once(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(["One", " two", " three", " four"], hold_after=3)
    pieces = [
        f"id: 1:{index}\nevent: output\ndata: {text}\n\n" for index, text in enumerate(("One", "  two"))
    ]
    third = "id: 1:2\nevent: output\ndata:  three\n\n"
    bodies = [
        "retry: 10\n\n" + "".join(pieces),
        "".join(pieces) + third + "id: 1:3\nevent: done\ndata: {}\n\n",
    ]
    user = users(gateway)
    user.page.route(
        "**/v1/stream/*", lambda route: route.fulfill(content_type="text/event-stream", body=bodies.pop(0))
    )
    user.send("Count")
    expect(user.answer).to_have_text("One two three")
    assert not bodies
    cog.release()
    expect(user.answer).to_have_text("One two three four")


def test_a_finished_answer_is_rendered_although_the_gateway_was_busy(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script(["**Bold**"])
    user = users(gateway)
    user.visit.allow_status(429)
    refusals = [429, 429]

    def refuse(route: Route) -> None:
        if refusals:
            route.fulfill(status=refusals.pop(), json={})
        else:
            route.continue_()

    user.page.route("**/page/markdown", refuse)
    user.ask("Hello")
    expect(user.answer.locator("strong")).to_have_text("Bold")
    assert not refusals


def begin_answer(users: Users, gateway: Gateway, cog: FakeCog) -> PageUser:
    """Return a user who has the first of the two pieces of an answer."""
    cog.rules.script = Script(["One", " two"], hold_after=1)
    user = users(gateway)
    user.send("Count")
    expect(user.answer).to_have_text("One")
    return user


def test_a_deleted_chat_stops_its_answer_and_stays_deleted(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = begin_answer(users, gateway, cog)
    (prediction,) = gateway.client.get("/v1/predictions").json()["results"]
    cancelling, polling = Held(user, "**/cancel"), Held(user, "**/v1/predictions/*")
    user.press("Delete")
    cancelling.wait()
    cancelling.release()
    gateway.wait_for(prediction, "canceled")
    polling.wait()
    with user.page.expect_response("**/v1/predictions/*"):
        polling.release()
    user.page.reload()
    expect(user.message).to_be_visible()
    assert user.chat_titles() == []


def test_more_answers_than_the_browser_has_connections_leave_the_page_usable(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    """A browser opens six HTTP/1.1 connections to one host, for all tabs together."""
    cog.rules.script = Script(["One", " two"], hold_after=1)
    user = users(gateway)
    for number in range(7):
        user.send(f"Chat {number}")
        expect(user.answer).to_have_text("One")
        if number < 6:
            user.press("New chat")
            expect(user.messages).to_have_count(0)
    user.press("Stop")
    expect(user.announcer).to_have_text("Answer stopped")
    other = PageUser(user.visit, user.visit.context.new_page())
    other.page.goto(f"{gateway.url}/#/usage")
    expect(other.page.get_by_role("definition").first).to_be_visible()
    other.page.close()
    user.follow("Chat 3")
    expect(user.answer).to_have_text("One")
    expect(user.button("Stop")).to_be_visible()
    cog.release()
    expect(user.answer).to_have_text("One two")
    # The answers of the chats that are not shown are stored, too.
    until(lambda: user.page.evaluate("() => JSON.stringify(localStorage)").count("One two") == 6)


def test_a_chat_that_is_shown_again_goes_on_with_its_answer(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = Script([f"{number} " for number in range(200)], gap=0.01)
    user = users(gateway)
    user.send("Count")
    expect(user.answer).to_contain_text("1 2 3")
    for _ in range(3):
        user.press("New chat")
        expect(user.answers).to_have_count(0)
        user.follow("Count")
    expect(user.announcer).to_have_text("Answer complete")
    expect(user.answer).to_have_text(" ".join(map(str, range(200))))


def test_the_draft_of_another_key_is_not_shown(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.ask("First")
    user.message.fill("A private draft")
    user.press("Edit")
    user.press("Log out")
    user.page.get_by_label("Key").fill(gateway.add_key("ann"))
    user.press("Log in")
    expect(user.message).to_have_value("")
    user.press("Log out")
    user.page.get_by_label("Key").fill(KEY)
    user.press("Log in")
    expect(user.message).to_have_value("A private draft")


def test_escape_while_a_chat_is_renamed_does_not_stop_the_answer(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = begin_answer(users, gateway, cog)
    user.press("Rename")
    user.page.keyboard.press("Escape")
    expect(user.button("Rename")).to_be_focused()
    expect(user.button("Stop")).to_be_visible()
    cog.release()
    expect(user.answer).to_have_text("One two")
    expect(user.announcer).to_have_text("Answer complete")


def test_enter_that_accepts_the_suggestion_of_an_input_method_sends_nothing(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    user = users(gateway)
    user.message.fill("にほん")
    user.message.evaluate(
        """(box) => [{ isComposing: true }, { keyCode: 229 }].forEach((state) => box.dispatchEvent(
            new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...state })))"""
    )
    user.message.fill("日本")
    user.page.keyboard.press("Enter")
    expect(user.messages).to_have_count(1)
    expect(user.button("Send")).to_be_visible()
    assert [inputs["messages"][0]["content"] for inputs in cog.predictions] == ["日本"]


def test_a_reader_who_has_scrolled_up_is_not_moved(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script([*(f"{line}\n\n" for line in range(60)), "The end"], hold_after=60)
    user = users(gateway)
    rendering = Held(user, "**/page/markdown")
    user.send("Count")
    expect(user.answer).to_contain_text("59")
    latest = user.button("Go to the latest text")
    expect(latest).to_be_hidden()
    conversation = user.page.get_by_role("region", name="Conversation")
    conversation.evaluate("(region) => region.scrollTo(0, 200)")
    expect(latest).to_be_visible()
    rendering.wait()
    rendering.release()
    expect(user.answer.get_by_role("paragraph")).to_have_count(60)
    cog.release()
    expect(user.answer).to_contain_text("The end")
    expect(user.button("Send")).to_be_visible()
    assert conversation.evaluate("(region) => region.scrollTop") == 200
    user.touch(latest)
    expect(latest).to_be_hidden()
    expect(user.answers.get_by_label("Measurements")).to_be_in_viewport()


def test_several_requests_without_a_login_open_one_dialog(users: Users, gateway: Gateway) -> None:
    user = users(gateway, key=None)
    loading = Held(user, MODEL)
    user.page.get_by_label("Key").fill(KEY)
    user.press("Log in")
    loading.wait()
    user.visit.allow_status(401)
    user.visit.context.clear_cookies()
    user.send("Hello")
    dialogs = user.page.get_by_role("dialog")
    expect(dialogs).to_have_count(1)
    with user.page.expect_response(MODEL):
        loading.release()
    dialogs.get_by_label("Key").fill(KEY)
    user.press("Log in")
    expect(user.messages).to_have_count(1)
    expect(user.button("Send")).to_be_visible()
    expect(dialogs).to_have_count(0)


def test_the_prediction_that_was_opened_last_is_shown(users: Users, gateway: Gateway) -> None:
    first, last = (gateway.wait_for(gateway.create(prompt=prompt)) for prompt in ("First", "Last"))
    user = users(gateway)
    loading = Held(user, f"**/v1/predictions/{first['id']}")
    user.page.goto(first["urls"]["web"])
    loading.wait()
    user.page.goto(last["urls"]["web"])
    expect(user.field("prompt")).to_have_value("Last")
    with user.page.expect_response(f"**/v1/predictions/{first['id']}"):
        loading.release()
    user.field("prompt").focus()
    expect(user.field("prompt")).to_have_value("Last")


def test_a_run_is_stopped_with_escape_and_not_by_opening_another_prediction(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    other = gateway.wait_for(gateway.create(prompt="Other"))
    cog.rules.script = Script(["One", " two"], hold_after=1)
    user = users(gateway, address="#/inputs")
    user.field("prompt").fill("Count")
    user.press("Run")
    output = user.page.locator("#output")
    expect(output).to_contain_text("One")
    user.page.goto(other["urls"]["web"])
    expect(user.alert).to_contain_text("Stop it before you open another one")
    expect(user.field("prompt")).to_have_value("Count")
    user.page.keyboard.press("Escape")
    expect(output).to_contain_text("Cancelled")
    until(lambda: cog.counts.cancelled == 1)


def test_the_usage_since_the_day_that_was_chosen_last_is_shown(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.ask("Hello")
    loading = Held(user, "**/page/usage")
    user.show("Usage")
    loading.wait()
    since = user.field("Since")
    since.fill("2100-01-01")
    expect(user.page.get_by_text("There is no usage since this day.")).to_be_visible()
    with user.page.expect_response("**/page/usage"):
        loading.release()
    since.focus()
    expect(user.page.get_by_text("There is no usage since this day.")).to_be_visible()
    expect(since).to_have_value("2100-01-01")

"""The page at other addresses than the usual one: below a path, without keys, and in two tabs."""

from __future__ import annotations

from collections.abc import Callable

from chromium import Chromium
from gateways import KEY, Gateway
from page_user import PageUser
from playwright.sync_api import expect
from prefix_proxy import PrefixProxy

from benchmarks.fake_cog import FakeCog, Script
from benchmarks.web_thread import WebThread

Users = Callable[..., PageUser]


def test_the_page_works_below_a_path(
    chromium: Chromium, gateways: Callable[..., Gateway], cog: FakeCog
) -> None:
    cog.rules.script = Script(["One", " two"], hold_after=1)
    with WebThread(None) as free:
        port = free.port
    url = f"http://127.0.0.1:{port}/llama"
    gateway = gateways(cog.url, public_url=url)
    with WebThread(PrefixProxy("/llama", gateway.url), port=port), chromium.visit(url) as visit:
        user = PageUser(visit.open())
        user.page.get_by_label("Key").fill(KEY)
        user.press("Log in")
        user.send("Count")
        expect(user.answer).to_have_text("One")
        cog.release()
        expect(user.answer).to_have_text("One two")
        (cookie,) = visit.context.cookies()
        assert cookie["path"] == "/llama"
        user.show("Inputs")
        expect(user.page.get_by_label("curl program")).to_contain_text(f"{url}/v1/models/")
        cog.rules.script = Script(["One"], hold_after=0)
        prediction = gateway.wait_for(gateway.create(prompt="Elsewhere"), "processing")
        assert prediction["urls"]["web"].startswith(f"{url}/#/predictions/")
        with user.page.expect_response(f"{url}/readyz") as ready:
            user.page.goto(prediction["urls"]["web"])
        assert ready.value.status == 200
        expect(user.field("prompt")).to_have_value("Elsewhere")
        cog.release()
        expect(user.page.locator("#output")).to_contain_text("Succeeded")
        user.press("Log out")
        expect(user.page.get_by_label("Key")).to_be_visible()
        assert visit.context.cookies() == []


def test_a_gateway_without_keys_asks_for_none(
    users: Users, gateways: Callable[..., Gateway], cog: FakeCog
) -> None:
    user = users(gateways(cog.url, key=None, notice="Do not enter <b>personal</b> data."), key=None)
    expect(user.page.get_by_text("Do not enter <b>personal</b> data.")).to_be_visible()
    user.ask("Hello")
    expect(user.answer).to_contain_text("Paris")
    expect(user.button("Log out")).to_be_hidden()
    assert user.visit.context.cookies() == []


def test_two_tabs_show_the_same_chats(users: Users, gateway: Gateway) -> None:
    user = users(gateway)
    user.ask("In the first tab")
    other = PageUser(user.visit, user.visit.context.new_page())
    other.page.goto(user.page.url)
    expect(other.answers).to_have_count(1)
    other.ask("In the second tab")
    expect(user.messages.last).to_contain_text("In the second tab")
    expect(user.answers).to_have_count(2)
    user.ask("In the first tab again")
    expect(other.answers).to_have_count(3)
    other.press("Delete")
    expect(other.answers).to_have_count(0)
    user.page.reload()
    expect(user.page.get_by_text("This chat is not stored in this browser.")).to_be_visible()

"""The page's form of the inputs, its programs to copy, and its usage, in a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from chromium import Screen
from gateways import KEY, Gateway
from node_clients import FOLDER, NodeClients
from page_user import PageUser
from playwright.sync_api import expect
from server_clients import Body, until

from benchmarks.fake_cog import FakeCog, Script

Users = Callable[..., PageUser]

DIFFICULT = """Say "it's" \\n, $HOME and `id`; 100% of ${x} #{y} <b> & \\\\.
JSON
EOF
\t'''three\"\"\" 😀 \u2028 é עברית"""


def run(user: PageUser) -> None:
    user.press("Run")
    expect(user.page.locator("#output")).to_contain_text(re.compile("Succeeded|Failed"))
    expect(user.button("Run")).to_be_visible()


def test_the_form_sends_only_what_was_changed(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    cog.rules.script = Script(["The <b>answer</b>"], logs="formatted prompt: '<s>[INST] Hi [/INST]'\n")
    user = users(gateway, screen, address="#/inputs")
    user.field("prompt").fill("Hi")
    user.field("temperature").fill("0.5")
    user.field("temperature").fill("0.7")  # the default again
    user.field("seed").fill("0")
    user.field("debug").check()
    run(user)
    assert cog.predictions == [{"prompt": "Hi", "seed": 0, "debug": True}]
    output = user.page.get_by_role("region", name="Output")
    expect(output).to_contain_text("The <b>answer</b>")
    expect(output.get_by_role("region", name="Formatted prompt")).to_have_text("<s>[INST] Hi [/INST]")
    expect(output.get_by_label("Measurements")).to_contain_text(re.compile("1 output token(?!s)"))
    assert user.overflow() == 0
    user.press("Reset")
    expect(user.field("prompt")).to_have_value("")
    expect(user.field("seed")).to_have_value("")


def test_the_form_says_what_is_wrong_at_the_field(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    user = users(gateway, address="#/inputs")
    temperature = user.field("temperature")
    temperature.fill("9")
    user.press("Run")
    expect(temperature).to_be_focused()
    expect(temperature).to_have_accessible_description(re.compile("Enter 5 or less"))
    temperature.fill("1")
    user.field("messages").fill('[{"role": "user"')
    user.press("Run")
    expect(user.field("messages")).to_have_accessible_description(re.compile("not valid JSON"))
    assert cog.predictions == []


def test_either_a_prompt_or_messages_are_sent(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    user = users(gateway, address="#/inputs")
    expect(user.field("prompt")).to_have_value("What is the capital of France?")
    user.field("messages").fill('[{"role": "user", "content": "Hi"}]')
    user.press("Run")
    expect(user.field("messages")).to_be_focused()
    expect(user.field("messages")).to_have_accessible_description(re.compile("either prompt or messages"))
    user.field("messages").fill("")
    user.field("prompt").fill("")
    user.press("Run")
    expect(user.field("prompt")).to_be_focused()
    expect(user.field("prompt")).to_have_accessible_description(re.compile("Enter a prompt"))
    assert cog.predictions == []


@pytest.mark.parametrize("error", [None, "E1002 PromptTooLong: too long"])
def test_run_shows_the_output_and_does_not_scroll_the_form(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen, error: str | None
) -> None:
    cog.rules.script = Script(["The answer"], error=error)
    user = users(gateway, screen, address="#/inputs")
    user.field("prompt").fill("Hi")
    place = user.button("Run").bounding_box()
    assert place is not None
    # Playwright's own click scrolls to the button first, although it can be seen.
    press = user.page.touchscreen.tap if screen.is_phone else user.page.mouse.click
    press(place["x"] + 10, place["y"] + 10)
    expect(user.page.locator("#output")).to_contain_text("Failed" if error else "Succeeded")
    expect(user.button("Run")).to_be_visible()
    expect(user.page.get_by_role("heading", name="Output")).to_be_in_viewport()
    expect(user.page.get_by_text("The answer", exact=True)).to_be_in_viewport()
    if not screen.is_phone:
        expect(user.field("prompt")).to_be_in_viewport()


def test_the_gateways_refusal_is_shown_at_the_field(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    user = users(gateway, address="#/inputs")
    user.visit.allow_status(422)
    user.field("prompt").fill("")
    user.field("messages").fill('["no object"]')
    user.press("Run")
    expect(user.field("messages")).to_be_focused()
    expect(user.field("messages")).to_have_accessible_description(re.compile(r"0: .*object"))
    expect(user.button("Run")).to_be_visible()


def test_a_run_can_be_stopped(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["One", " two", " three"], hold_after=2)
    user = users(gateway, address="#/inputs")
    user.field("prompt").fill("Count")
    user.press("Run")
    expect(user.page.locator("#output")).to_contain_text("One two")
    user.press("Stop")
    expect(user.page.locator("#output")).to_contain_text("Cancelled")
    expect(user.page.locator("#output")).to_contain_text("One two")
    until(lambda: cog.counts.cancelled == 1)


def test_the_address_of_a_prediction_shows_it(users: Users, gateway: Gateway, screen: Screen) -> None:
    prediction = gateway.wait_for(gateway.create(prompt="What is the capital?", temperature=0.3))
    user = users(gateway, screen)
    user.page.goto(prediction["urls"]["web"])
    expect(user.page.locator("#output")).to_contain_text("The capital of France is Paris.")
    expect(user.field("prompt")).to_have_value("What is the capital?")
    expect(user.field("temperature")).to_have_value("0.3")
    user.visit.allow_status(404)
    user.page.goto(f"{gateway.url}/#/predictions/{'a' * 26}")
    expect(user.page.locator("#output")).to_contain_text("There is no prediction with this id")


def test_a_failed_run_shows_its_error(users: Users, gateway: Gateway, cog: FakeCog) -> None:
    cog.rules.script = Script(["One"], error="E1002 PromptTooLong: the prompt has 5000 tokens")
    user = users(gateway, address="#/inputs")
    user.field("prompt").fill("Count")
    run(user)
    expect(user.page.locator("#output")).to_contain_text("E1002 PromptTooLong")


@pytest.fixture
def environment(node_clients: NodeClients, tmp_path: Path) -> dict[str, Any]:
    """Where the programs run: a folder in which JavaScript finds what is pinned for the tests."""
    (tmp_path / "node_modules").symlink_to(FOLDER / "node_modules")
    return {"cwd": tmp_path, "env": {**os.environ, "REPLICATE_API_TOKEN": KEY, "NO_PROXY": "127.0.0.1"}}


def test_the_programs_to_copy_run_as_they_are(
    users: Users, gateway: Gateway, cog: FakeCog, environment: dict[str, Any], screen: Screen
) -> None:
    user = users(gateway, screen, address="#/inputs")
    user.field("prompt").fill(DIFFICULT)
    user.field("stop_sequences").fill("'a,\"b")
    user.field("temperature").fill("0.5")
    user.field("prompt_template").fill("{prompt}")
    user.field("debug").check()
    run(user)
    for language, command in {"curl": "bash", "Python": sys.executable, "JavaScript": "node"}.items():
        user.touch(user.page.get_by_role("tab", name=language, exact=True))
        user.touch(user.page.get_by_role("region", name="Request").get_by_role("button", name="Copy"))
        expect(user.announcer).to_have_text("Copied")
        program = Path(environment["cwd"], f"program-{language}.mjs")
        program.write_text(user.clipboard())
        done = subprocess.run(
            [command, program], **environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        output = "".join(json.loads(done.stdout)["output"]) if language == "curl" else done.stdout
        assert "The capital of France is Paris." in output
    assert len(cog.predictions) == 4
    assert cog.predictions[0]["prompt"] == DIFFICULT
    assert all(inputs == cog.predictions[0] for inputs in cog.predictions)


def test_usage_agrees_with_the_predictions(
    users: Users, gateway: Gateway, cog: FakeCog, screen: Screen
) -> None:
    scripts = {
        "long": Script([" word"] * 1200),
        "short": Script(["word"]),
        "fails": Script(["one", "two"], error="E2001 GenerationFailed: none left"),
        "stops": Script(["one", "two", "three"], hold_after=3),
    }
    cog.rules.script = lambda inputs: scripts[inputs["prompt"].split()[-1]]
    created = [gateway.create(prompt=f"{'two words ' * 40}{name}") for name in scripts for _ in range(2)]
    until(lambda: [len(gateway.get(stopped)["output"] or ()) for stopped in created[6:]] == [3, 3])
    for stopped in created[6:]:
        gateway.client.post(f"/v1/predictions/{stopped['id']}/cancel")
    metrics = [gateway.wait_for(prediction)["metrics"] for prediction in created]
    inputs, outputs = (sum(m[f"{kind}_token_count"] for m in metrics) for kind in ("input", "output"))
    price = gateway.settings.prices.of(inputs, outputs).quantize(Decimal("0.000001"))
    user = users(gateway, screen, address="#/usage")
    days = {gateway.get(prediction)["created_at"][:10] for prediction in created}
    if days != {today := datetime.now(UTC).date().isoformat()}:
        pytest.skip("a day began during the test, so the table has another row")
    totals = user.page.get_by_role("definition")
    expect(totals).to_have_text(
        ["8", f"{inputs:,}", f"{outputs:,}", f"${price}".rstrip("0"), re.compile(r"[\d.]+")]
    )
    row = user.page.get_by_role("row").last
    assert row.get_by_role("rowheader").text_content() == today
    assert row.get_by_role("cell").all_text_contents() == totals.all_text_contents()
    assert user.overflow() == 0
    user.field("Since").fill("2099-01-01")
    expect(user.page.get_by_text("There is no usage since this day.")).to_be_visible()


def test_the_chat_shows_the_tokens_and_the_price_of_an_answer(
    users: Users, gateways: Callable[..., Gateway], cog: FakeCog
) -> None:
    cog.rules.script = Script([" word"] * 1500)
    user = users(gateways(cog.url, output_price="10"))
    user.ask("Hi")
    measured = user.answers.get_by_label("Measurements")
    expect(measured).to_contain_text("1,500 output tokens")
    expect(measured).to_contain_text("$0.015 price")


def test_both_views_show_how_long_an_answer_waited_in_the_queue(
    users: Users, gateways: Callable[..., Gateway], cog: FakeCog
) -> None:
    gateway = gateways(cog.url, places=1)
    cog.rules.script = Script(["Done"], hold_after=0)
    gateway.wait_for(gateway.create(prompt="First"), "processing")
    cog.rules.script = Script(["Done"])
    user = users(gateway)
    user.send("Second")
    expect(user.answers).to_contain_text("Waiting for the first token")
    user.page.wait_for_timeout(200)
    cog.release()
    expect(user.answers.get_by_label("Measurements")).to_contain_text(re.compile(r"\d s in the queue"))
    user.follow("Open in Inputs")
    output = user.page.locator("#output")
    expect(output.get_by_label("Measurements")).to_contain_text(re.compile(r"\d s in the queue"))


def test_the_chat_shows_the_formatted_prompt_if_the_server_may_log_it(
    users: Users, gateway: Gateway, cog: FakeCog
) -> None:
    cog.rules.script = log_with_debug
    user = users(gateway)
    user.ask("Hi")
    user.touch(user.answers.get_by_text("Formatted prompt"))
    expect(user.answers).to_contain_text("select debug in Settings")
    user.open_panel("Settings")
    user.field("debug").check()
    user.ask("Hi again")
    user.touch(user.answers.last.get_by_text("Formatted prompt"))
    expect(user.answers.last.get_by_role("region", name="Formatted prompt")).to_contain_text("[INST] Hi")


def log_with_debug(inputs: Body) -> Script:
    return Script(["Hello"], logs="formatted prompt: '[INST] Hi [/INST]'\n" if inputs.get("debug") else "")

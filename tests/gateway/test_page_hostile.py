"""Texts that attack the page, in every place where it shows what a model or a user wrote, in a real browser.

After each of them, no script has run, no request has left for another address, no dialog is open, and the
page still works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from chromium import PHONE
from gateways import Gateway
from page_user import PageUser
from playwright.sync_api import expect

from benchmarks.fake_cog import FakeCog, Script

Users = Callable[..., PageUser]

HIT = "window.hit=1"
ELSEWHERE = "http://192.0.2.1"  # an address for documentation, where nothing answers

LINKS = "\n\n".join(
    f"[link]({url})"
    for url in (
        f"javascript:{HIT}",
        f"JaVaScRiPt:{HIT}",
        f"java\tscript:{HIT}",
        f"javascript&#58;{HIT}",
        f"javascript&colon;{HIT}",
        f"&#x6A;avascript:{HIT}",
        f" javascript:{HIT}",
        f"\x01javascript:{HIT}",
        f"<javascript:{HIT}>",
        f"<java\nscript:{HIT}>",
        f"vbscript:{HIT}",
        f"data:text/html,<script>{HIT}</script>",
        "data:text/html;base64,PHNjcmlwdD53aW5kb3cuaGl0PTE8L3NjcmlwdD4=",
        f"blob:{ELSEWHERE}/1",
        "//192.0.2.1/",
        "file:///etc/passwd",
        "page/logout",
        f'https://example.com/" onmouseover="{HIT}',
    )
)

HTML = f"""<img src=x onerror={HIT}> <svg onload={HIT}></svg> <svg><script>{HIT}</script></svg>

<script>{HIT}</script><script src="{ELSEWHERE}/x.js"></script><style>*{{display:none!important}}</style>

<iframe src="javascript:{HIT}"></iframe><object data="{ELSEWHERE}"></object><embed src="{ELSEWHERE}">

<details open ontoggle={HIT}><input autofocus onfocus={HIT}><body onload={HIT}><video src onerror={HIT}>

</article></section></main><math><mi//xlink:href="data:x,<script>{HIT}</script>">

<a href="javascript:{HIT}">a</a> <b onmouseover={HIT}>b</b> <p style="position:fixed;inset:0">over all</p>"""

PAGE_TAGS = f"""<base href="{ELSEWHERE}/"> <meta http-equiv="refresh" content="0;url={ELSEWHERE}/">

<link rel="stylesheet" href="{ELSEWHERE}/x.css"><link rel="prefetch" href="{ELSEWHERE}/">

<form action="{ELSEWHERE}/"><input name="key"><button>Log in</button></form>

<plaintext> <textarea> <title> <noscript><p title="</noscript><img src=x onerror={HIT}>">"""

CLOBBERING = """<form id="composer"></form><input id="message"><a id="send"></a><img name="getElementById">

<a id="location" href="x"></a><form id="document"><input name="body"></form><p id="turns">

[id]: # (comment)

# message {#message}

<h1 id=announcer>x</h1> __proto__ constructor toString {{constructor.constructor('window.hit=1')()}} ${window.hit=1}"""

CODE = f"""```html
<script>{HIT}</script><img src=x onerror={HIT}>
```

```javascript" onclick="{HIT}
{HIT}
```

`<img src=x onerror={HIT}>`

    <script>{HIT}</script>

~~~<img src=x onerror={HIT}>
unclosed"""

ENTITIES = f"""&lt;img src=x onerror={HIT}&gt; &amp;lt;script&amp;gt; &#60;script&#62;{HIT}&#60;/script&#62; &nbsp;&zwj;

\\<script>{HIT}\\</script> <scr<script>ipt>{HIT}</scr</script>ipt> <!-- <script>{HIT}</script> --> <![CDATA[<script>{HIT}</script>]]>

\ufeff\u0000<im\u0000g src=x onerror={HIT}> \uff1cscript\uff1e{HIT}\uff1c/script\uff1e"""

IMAGES = f"""![a]({ELSEWHERE}/a.png) ![b](javascript:{HIT}) ![c](x" onerror="{HIT}) [![d]({ELSEWHERE}/d.png)]({ELSEWHERE}/)

![e][e] <{ELSEWHERE}/auto> {ELSEWHERE}/bare www.example.com

[e]: {ELSEWHERE}/e.png "title' onload={HIT}\""""

SHORT = [HTML, PAGE_TAGS, LINKS, IMAGES, CODE, ENTITIES, CLOBBERING]

LONG = {
    "lines": "\n".join(f"line {number}" for number in range(10_000)),
    "no-space": "x" * 100_000,
    "more-than-is-rendered": "**x** " * 20_000,
    "bidi": "\u202eright to left\u2066\u2067\u202d " * 200 + "\u0301" * 2000 + "\u200b\u2028\u2029" * 500,
    "quotes": ">" * 5000 + " deep",
    "lists": "\n".join(f"{'  ' * depth}- item" for depth in range(400)) + "\n" + "- " * 5000 + "deep",
    "table": "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n|" + "b|" * 300,
    "headings": "# x\n" * 3000,
}


@pytest.fixture(scope="module")
def cog() -> Iterator[FakeCog]:
    with FakeCog() as running:
        yield running


@pytest.fixture(scope="module")
def module_gateway(cog: FakeCog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with Gateway([cog.url], tmp_path_factory.mktemp("hostile") / "gateway.sqlite3") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def gateways(module_gateway: Gateway) -> Gateway:
    """One for all tests, because they change nothing in it."""
    return module_gateway


def test_short_texts_do_no_harm(users: Users, module_gateway: Gateway, cog: FakeCog) -> None:
    user = users(module_gateway, PHONE)
    for text in SHORT:
        say_everywhere(user, cog, text)
        expect(user.answers.nth(-2).locator(".answer-text > .plain")).to_be_empty()  # all of it is rendered
    user.page.reload()
    expect(user.answers).to_have_count(2 * len(SHORT))
    check_unharmed(user)


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_does_no_harm(users: Users, module_gateway: Gateway, cog: FakeCog, name: str) -> None:
    user = users(module_gateway, PHONE)
    user.visit.allow_status(413, 422)  # the gateway renders no text that is too long or too complex
    say_everywhere(user, cog, LONG[name])
    user.page.reload()
    expect(user.answers).to_have_count(2)
    check_unharmed(user)


def say_everywhere(user: PageUser, cog: FakeCog, text: str) -> None:
    """Use a text as a message, as an answer, as an error, as a title, as an output and as a log."""
    before = user.answers.count()
    pieces = [text[start : start + 4000] for start in range(0, len(text), 4000)]
    cog.rules.script = Script(pieces, logs=f"formatted prompt: {text!r}\n")
    user.paste(text)
    user.press("Send")
    expect(user.answers).to_have_count(before + 1)
    expect(user.button("Send")).to_be_visible()
    check_unharmed(user)
    cog.rules.script = Script(["x"], error=f"E9999 Hostile: {text[:20_000]}")
    user.ask("Fail")
    user.press("Rename")
    user.page.get_by_role("textbox", name="Title").fill(text[:200])
    user.press("Save")
    check_unharmed(user)
    user.touch(user.answers.nth(before).get_by_role("link", name="Open in Inputs"))
    expect(user.page.locator("#output")).to_contain_text("Succeeded")
    check_unharmed(user, view="Inputs")
    user.show("Chat")


HARM = """() => Object.entries({
    script: window.hit,
    link: [...document.links].find((link) => !["http:", "https:", "mailto:"].includes(link.protocol)),
    tag: document.querySelector("dialog[open], iframe, object, embed, base, main :is(img, link, meta, script, style)"),
    id: [...document.querySelectorAll("[id]")].find((one) => document.getElementById(one.id) !== one),
    attribute: [...document.querySelectorAll(".turn *, #output *, #chat-list *, #notices *")].find((one) =>
        one.getAttributeNames().some((name) => /^on|^style$/.test(name))),
}).filter(([, found]) => found).map(([what, found]) => `${what}: ${found.outerHTML ?? found}`)"""
"""Lists what a hostile text must not have changed."""


def check_unharmed(user: PageUser, view: str = "Chat") -> None:
    assert user.page.url.startswith(f"{user.visit.url}/#/")
    assert user.page.evaluate(HARM) == []
    assert len(user.visit.context.pages) == 1
    assert user.overflow() == 0
    # A person who taps does not have to wait.
    user.link(view).tap(timeout=5000)
    expect(user.link(view)).to_have_attribute("aria-current", "page", timeout=5000)

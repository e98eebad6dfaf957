"""Markdown as HTML: what is shown, that nothing dangerous is left, and that no text takes long."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_clients import until

from llama import ROOT
from llama.gateway.page.markdown import ALIGNMENTS, ATTRIBUTES, LANGUAGE_CLASS, LINK_ATTRIBUTES, TAGS, html_of
from llama.gateway.page.renderer import MAX_CHARACTERS, MarkdownRenderer, TooComplex, TooManyTexts

LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


class Checker(HTMLParser):
    """Reads HTML as a browser does, and lists what must not be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in TAGS:
            self.wrong.append(f"<{tag}>")
        for name, value in attrs:
            if not allowed(tag, name, value or ""):
                self.wrong.append(f"<{tag} {name}={value!r}>")
        if tag == "a" and not LINK_ATTRIBUTES.items() <= dict(attrs).items():
            self.wrong.append(f"<a> with {attrs}")

    def handle_comment(self, data: str) -> None:
        self.wrong.append(f"<!--{data}-->")

    def handle_decl(self, decl: str) -> None:
        self.wrong.append(f"<!{decl}>")

    def unknown_decl(self, data: str) -> None:
        self.wrong.append(f"<![{data}]>")

    def handle_pi(self, data: str) -> None:
        self.wrong.append(f"<?{data}>")

    def handle_data(self, data: str) -> None:
        self.text += data


def allowed(tag: str, name: str, value: str) -> bool:
    if tag == "a" and name == "href":
        return value.lower().startswith(("http://", "https://", "mailto:"))
    if tag == "a" and name in LINK_ATTRIBUTES:
        return value == LINK_ATTRIBUTES[name]
    if tag == "code" and name == "class":
        return bool(LANGUAGE_CLASS.fullmatch(value))
    if tag in ("td", "th") and name == "align":
        return value in ALIGNMENTS
    return name in ATTRIBUTES.get(tag, set())


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    return checker


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("", ""),
        ("plain & simple", "<p>plain &amp; simple</p>\n"),
        ("*a* **b** ~~c~~ `d`", "<p><em>a</em> <strong>b</strong> <s>c</s> <code>d</code></p>\n"),
        ("# A\n###### B", "<h3>A</h3>\n<h6>B</h6>\n"),
        ("a\nb  \nc", "<p>a<br>\nb<br>\nc</p>\n"),
        ("> a\n\n---", "<blockquote>\n<p>a</p>\n</blockquote>\n<hr>\n"),
        ("- a\n  - b", "<ul>\n<li>a\n<ul>\n<li>b</li>\n</ul>\n</li>\n</ul>\n"),
        ("3. a", '<ol start="3">\n<li>a</li>\n</ol>\n'),
        ("```python\nif a < b:\n```", '<pre><code class="language-python">if a &lt; b:\n</code></pre>\n'),
        ("```c++\nx\n```", '<pre><code class="language-c++">x\n</code></pre>\n'),
        ("    code", "<pre><code>code\n</code></pre>\n"),
        ("[a](https://b.c/d?e=f&g)", f'<p><a href="https://b.c/d?e=f&amp;g" {LINK}>a</a></p>\n'),
        ('[a](http://b "c")', f'<p><a href="http://b" title="c" {LINK}>a</a></p>\n'),
        ("[a](HTTPS://b)", f'<p><a href="HTTPS://b" {LINK}>a</a></p>\n'),
        ("<https://b.c>", f'<p><a href="https://b.c" {LINK}>https://b.c</a></p>\n'),
        ("<a@b.c>", f'<p><a href="mailto:a@b.c" {LINK}>a@b.c</a></p>\n'),
        ("[a][1]\n\n[1]: https://b", f'<p><a href="https://b" {LINK}>a</a></p>\n'),
        ("https://b.c", "<p>https://b.c</p>\n"),
        ("![a *cat*](https://b/c.png)", "<p>a cat</p>\n"),
        ("![<b>](x)", "<p>&lt;b&gt;</p>\n"),
        ("[![a](b)](https://c)", f'<p><a href="https://c" {LINK}>a</a></p>\n'),
    ],
)
def test_markdown_is_shown(text: str, html: str) -> None:
    assert html_of(text) == html
    assert not checked(html).wrong


def test_a_table_is_aligned_without_a_style() -> None:
    html = html_of("|a|b|c|d|\n|:-|:-:|-:|-|\n|1|2|3|4|\n")
    for tag, text, align in [
        ("th", "a", "left"),
        ("th", "b", "center"),
        ("td", "3", "right"),
    ]:
        assert f'<{tag} align="{align}">{text}</{tag}>' in html
    assert "<td>4</td>" in html
    assert "style" not in html


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
        "<img src=x onerror=alert(1)>",
        '<img src="x" onerror="alert(1)"',
        "<svg onload=alert(1)><script>alert(1)</script></svg>",
        "<svg><a xlink:href='javascript:alert(1)'><text>x</text></a></svg>",
        "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
        "<style>*{display:none}</style>",
        "<p style='position:fixed'>x</p>",
        "<iframe src=javascript:alert(1)></iframe>",
        "<iframe srcdoc='<script>alert(1)</script>'>",
        "<object data=x></object><embed src=x><applet code=x>",
        "<form action=//evil.example><input name=key><button formaction=javascript:alert(1)>x</button></form>",
        "<base href=//evil.example/><link rel=stylesheet href=x><meta http-equiv=refresh content=0>",
        "<template><script>alert(1)</script></template>",
        "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
        "<details open ontoggle=alert(1)>x</details>",
        "<video><source onerror=alert(1)></video><audio src=x onerror=alert(1)>",
        "<a id=app name=body href=https://a>x</a>",
        "<b class=dialog data-x=y hidden>x</b>",
        "<!-- <script>alert(1)</script> -->",
        "<!--><script>alert(1)</script>-->",
        "<?php x ?> <!DOCTYPE html> <![CDATA[<script>alert(1)</script>]]>",
        "</p></div></body></html><script>alert(1)</script>",
        "> - <script>alert(1)</script>\n>   1. <img src=x onerror=alert(1)>",
        "|<script>alert(1)</script>|<img src=x onerror=alert(1)>|\n|-|-|\n|</table><script>|<b>|",
        "`</code><script>alert(1)</script>`",
        "```html\n<script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```",
        '```"><script>alert(1)</script>\nx\n```',
        "```x onclick=alert(1)\nx\n```",
        "~~~ ' onclick='alert(1)\nx\n~~~",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "&#60;script&#62;alert(1)&#x3c;/script&#x3e;",
        "\\<script\\>alert(1)\\</script\\>",
        "<scr\0ipt>alert(1)</scr\0ipt>",
        "<script\u2028>alert(1)</script>",
        "# <script>alert(1)</script>\n\n<script>\nalert(1)\n=====\n",
        "**<img src=x onerror=alert(1)>** ~~<svg/onload=alert(1)>~~",
        "# a {#id .class onclick=alert(1)}",
    ],
)
def test_html_in_markdown_is_text(text: str) -> None:
    html = html_of(text)
    assert not checked(html).wrong
    for tag in ("script", "img", "svg", "iframe", "style", "form", "input"):
        assert f"<{tag}" not in html.lower()


DANGEROUS = [
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "javascript&colon;alert(1)",
    "&#106;avascript:alert(1)",
    "&#x6A&#x61;vascript:alert(1)",
    "java&#9;script:alert(1)",
    "java&Tab;script:alert(1)",
    "java&NewLine;script:alert(1)",
    "&#1;javascript:alert(1)",
    "&nbsp;javascript:alert(1)",
    "java\\script:alert(1)",
    "%6aavascript:alert(1)",
    "\x01javascript:alert(1)",
    "\ufeffjavascript:alert(1)",
    "vbscript:msgbox(1)",
    "VbScRiPt:msgbox(1)",
    "data:text/html,<script>alert(1)</script>",
    "data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "data:image/png;base64,iVBORw0KGgo=",  # markdown-it itself allows it
    "file:///etc/passwd",
    "blob:https://a/b",
    "filesystem:https://a/b",
    "view-source:https://a",
    "about:blank",
    "tel:1",
    "ftp://a",
    "x:y",
    "/v1/predictions",
    "//evil.example",
    "\\\\evil.example",
    "#/predictions/x",
    "?x",
    "page/logout",
    "https:evil",
    "//javascript:alert(1)",
]
FORMS = {
    "inline": "[x]({})",
    "in angle brackets": "[x](<{}>)",
    "with a title": '[x]({} "t\\" onclick=alert(1)")',
    "reference": "[x][a]\n\n[a]: {}",
    "reference in angle brackets": "[a]\n\n[a]: <{}> 'title'",
    "autolink": "<{}>",
    "image": "![x]({})",
    "image in a link": "[![x]({0})]({0})",
    "in a table": "|[x]({})|\n|-|\n",
    "in a list": "- > [x]({})",
    "in a heading": "# *[**x**]({})*",
    "html": '<a href="{}">x</a>',
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_links_lead_to_web_pages_and_mail_addresses_only(form: str) -> None:
    for address in DANGEROUS:
        html = html_of(form.format(address))
        assert not checked(html).wrong, address
        assert "<a href" not in html, address


@pytest.mark.parametrize("language", ["a" * 100, "x y", "<b>", '"', "a&quot;b", "x\u00e9", "{.evil}", "(x)"])
def test_a_strange_language_of_a_code_block_is_dropped(language: str) -> None:
    html = html_of(f"```{language}\ncode\n```")
    assert not checked(html).wrong
    assert "code\n</code></pre>" in html


@pytest.mark.parametrize(
    "text", [">" * 1000 + "a", "- " * 1000 + "a", "".join("  " * i + "* a\n" for i in range(300)), "[" * 1000]
)
def test_deep_nesting_is_cut_off(text: str) -> None:
    html = html_of(text)
    assert not checked(html).wrong
    assert html.count("<ul>") + html.count("<blockquote>") <= 50


@pytest.mark.parametrize("definition", ["[a]: https://a/{}", "[a]: https://a '{}'"], ids=["address", "title"])
def test_references_to_a_long_address_do_not_multiply_it(definition: str) -> None:
    html = html_of(definition.format("y" * 30_000) + "\n\n" + "[a] " * 10_000)
    assert not checked(html).wrong
    assert html.count("<a href") == 3  # the others are text
    assert html.count(">a</a>") == 10_000
    assert len(html) < 1_000_000


PIECES = st.sampled_from(
    [
        *(
            "<",
            ">",
            '"',
            "'",
            "`",
            "```",
            "~~~",
            "*",
            "**",
            "_",
            "~~",
            "|",
            "\n",
            "\n\n",
            "- ",
            "1. ",
            "> ",
            "    ",
        ),
        *(
            "[",
            "]",
            "(",
            ")",
            "![",
            "](",
            "]: ",
            ":",
            "&",
            ";",
            "&lt;",
            "&#60;",
            "\\",
            "#",
            "=",
            " ",
            "\t",
            "\0",
        ),
        *(
            "<script>",
            "</script>",
            "<img src=x onerror=y>",
            "<svg",
            "<!--",
            "-->",
            "<style>",
            "<a href=",
            "</code>",
        ),
        *(
            "javascript:x",
            "data:text/html,x",
            "https://a",
            "mailto:a@b",
            "on",
            "id=x",
            "class=x",
            "|-|\n",
            "|:-:|\n",
        ),
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES | st.text(max_size=3), max_size=20).map("".join))
def test_nothing_outside_the_lists_is_ever_in_the_html(text: str) -> None:
    assert not checked(html_of(text)).wrong


# The process that renders

SLOW = "![" * (MAX_CHARACTERS // 2)


def run(scene: Callable[[MarkdownRenderer], Awaitable[None]], seconds: float = 60) -> None:
    async def with_renderer() -> None:
        async with MarkdownRenderer(seconds) as renderer:
            await scene(renderer)

    asyncio.run(with_renderer())


def test_a_process_renders_all_texts() -> None:
    texts = ["", "*a*", "é \ud7ff 😀 \0", "a" * MAX_CHARACTERS, "- a\n" * 10_000, "*b*"]

    async def scene(renderer: MarkdownRenderer) -> None:
        found = await asyncio.gather(*(renderer.html_of(text, 1) for text in texts))
        assert found == [html_of(text) for text in texts]

    run(scene)


def test_a_text_that_takes_too_long_is_given_up_and_the_next_one_is_rendered() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        for _ in range(5):  # the process has just ended, and its exit code must not be missed
            with pytest.raises(TooComplex):
                await renderer.html_of(SLOW, 1)
        assert await renderer.html_of("a", 1) == "<p>a</p>\n"

    run(scene, seconds=0.2)


def test_a_request_that_is_given_up_does_not_disturb_the_next_one() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await renderer.html_of(SLOW, 1)
        assert await renderer.html_of("a", 1) == "<p>a</p>\n"

    run(scene)


def test_a_text_waits_for_at_most_one_text_of_another_owner() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        slow = [asyncio.create_task(renderer.html_of(SLOW, 1)) for _ in range(6)]
        await asyncio.sleep(0)  # until they wait
        assert await renderer.html_of("a", 2) == "<p>a</p>\n"
        assert sum(not task.done() for task in slow) >= 5
        assert all(
            isinstance(error, TooComplex) for error in await asyncio.gather(*slow, return_exceptions=True)
        )

    run(scene, seconds=0.2)


def test_an_owner_has_a_limit_of_waiting_texts() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        for _ in range(2):  # those that have ended do not count
            results = await asyncio.gather(
                *(renderer.html_of("a", 1) for _ in range(10)),
                renderer.html_of("a", 2),
                return_exceptions=True,
            )
            assert [type(result) for result in results] == [str] * 8 + [TooManyTexts] * 2 + [str]

    run(scene)


def test_texts_that_are_given_up_do_not_count_and_are_not_rendered() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        for _ in range(3):
            slow = [asyncio.create_task(renderer.html_of(SLOW, 1)) for _ in range(8)]
            await asyncio.sleep(0)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
        assert await renderer.html_of("a", 1) == "<p>a</p>\n"

    run(scene)


def test_a_process_that_the_system_killed_is_replaced() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        await renderer.html_of("a", 1)
        process = renderer._process
        assert process is not None
        process.kill()
        await process.wait()
        assert await renderer.html_of("a", 1) == "<p>a</p>\n"

    run(scene)


def test_the_process_ends_with_the_gateway_even_if_that_is_killed() -> None:
    code = """
import asyncio, os
from llama.gateway.page.renderer import MarkdownRenderer
async def main():
    renderer = MarkdownRenderer()
    await renderer.html_of("a", 1)
    print(renderer._process.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    until(lambda: has_ended(int(result.stdout)))


def has_ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # ended, but no process has asked for its exit code


def test_texts_do_not_add_up_to_the_limit_of_one() -> None:
    async def scene(renderer: MarkdownRenderer) -> None:
        for _ in range(20):
            assert await renderer.html_of("- a\n" * 400, 1)

    run(scene, seconds=0.5)

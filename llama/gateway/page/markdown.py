"""Turns Markdown into HTML that a page can insert, whatever the model wrote.

The parser leaves HTML in the text as text, and the sanitiser then keeps only the tags and attributes in the
lists below. Knows nothing about processes or time; `renderer.py` limits them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import nh3
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

# fmt: off
TAGS = frozenset((
    "a", "blockquote", "br", "code", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
    "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
))
# fmt: on
# No id and no name: the page's scripts could take such an element for one of their own.
ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}}
ALIGNMENTS = frozenset(("left", "center", "right"))
SCHEMES = frozenset(("http", "https", "mailto"))
LINK_ATTRIBUTES = {"rel": "noopener noreferrer nofollow", "target": "_blank"}
LANGUAGE_CLASS = re.compile(r"language-[A-Za-z0-9_.+#-]{1,40}")
_ABSOLUTE = re.compile(r"(https?://|mailto:).*", re.IGNORECASE | re.DOTALL)
"""`https:path` is not absolute: on a page with this scheme it is a relative address."""

_PAGE_LEVELS = 2  # of headings, which the page itself uses
_MAX_NESTING = 50  # text that is nested more deeply in lists or quotes is left out
_MAX_ADDRESS_CHARACTERS = 100_000
"""How many characters the addresses and titles of all links may have together. Otherwise a text that defines
a long address once and refers to it thousands of times would become hundreds of megabytes of HTML."""


def html_of(text: str) -> str:
    """Return Markdown as HTML. Images are shown as their descriptions. Relative links are shown as text, and
    so are all links after the first _MAX_ADDRESS_CHARACTERS of addresses and titles."""
    return _CLEANER.clean(_PARSER.render(text))


def _parser() -> MarkdownIt:
    parser = MarkdownIt(
        "js-default", {"html": False, "breaks": True, "linkify": False, "maxNesting": _MAX_NESTING}
    )
    parser.core.ruler.push("alignment", _align)
    parser.core.ruler.push("levels", _lower_headings)
    parser.core.ruler.push("addresses", _limit_addresses)
    parser.add_render_rule("image", _image)
    return parser


def _align(state: StateCore) -> None:
    """Align the cells of a table without a style, which the page's content security policy forbids."""
    for token in state.tokens:
        style = token.attrs.pop("style", None) if token.type in ("th_open", "td_open") else None
        if style is not None:
            token.attrs["align"] = str(style).removeprefix("text-align:")


def _lower_headings(state: StateCore) -> None:
    """Let headings begin below those of the page, which screen readers list together with them."""
    for token in state.tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + _PAGE_LEVELS, 6)}"


def _limit_addresses(state: StateCore) -> None:
    """Remove the addresses and titles after the first _MAX_ADDRESS_CHARACTERS."""
    size = 0
    for token in (inner for block in state.tokens for inner in block.children or ()):
        size += sum(len(str(value)) for value in token.attrs.values())
        if size > _MAX_ADDRESS_CHARACTERS:
            token.attrs.clear()


def _image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    return escapeHtml(renderer.renderInlineAsText(tokens[index].children or [], options, env))


def _attribute(_: str, name: str, value: str) -> str | None:
    form = {"class": LANGUAGE_CLASS, "href": _ABSOLUTE}.get(name)
    return value if form is None or form.fullmatch(value) else None


_PARSER = _parser()
_CLEANER = nh3.Cleaner(
    tags=set(TAGS),
    attributes=ATTRIBUTES,
    attribute_filter=_attribute,
    tag_attribute_values={tag: {"align": set(ALIGNMENTS)} for tag in ("td", "th")},
    set_tag_attribute_values={"a": {"target": LINK_ATTRIBUTES["target"]}},
    link_rel=LINK_ATTRIBUTES["rel"],
    url_schemes=set(SCHEMES),
    url_relative="deny",
)

"""Markdown as HTML that a page can show, whatever the model wrote."""

from __future__ import annotations

import asyncio

import nh3
from markdown_it import MarkdownIt

MAX_CHARACTERS = 100_000

_PARSER = MarkdownIt("js-default", {"html": False, "linkify": False, "maxNesting": 20}).disable("image")


async def html_of(text: str) -> str:
    return await asyncio.to_thread(lambda: nh3.clean(_PARSER.render(text)))

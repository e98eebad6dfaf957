"""The page's files as they are written: types, format, imports, and that they ask no other address for anything."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from node_clients import FOLDER, NodeClients

from llama import ROOT

STATIC = ROOT / "llama" / "gateway" / "page" / "static"
MODULES = sorted(STATIC.glob("**/*.js"))
STYLES = sorted(STATIC.glob("**/*.css"))
PAGES = sorted(STATIC.glob("**/*.html"))
IMPORT = re.compile(r"""^(?:import|export|\}) .*?from "(\.\.?/[^"]+)";$""", re.MULTILINE)
LINES = 250

# fmt: off
TYPE_CHECK = [
    "tsc", "--noEmit", "--allowJs", "--checkJs", "--strict", "--noUncheckedIndexedAccess", "--noUnusedLocals",
    "--noUnusedParameters", "--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler",
    "--lib", "es2022,dom,dom.iterable", "--types", "",
]
# fmt: on
FORMAT_CHECK = ["prettier", "--no-config", "--print-width", "110", "--check"]


@pytest.mark.parametrize(("tool", "files"), [
    (TYPE_CHECK, MODULES), (FORMAT_CHECK, [*MODULES, *STYLES, *PAGES]),
], ids=["types", "format"])  # fmt: skip
def test_the_modules_pass_the_check_of(node_clients: NodeClients, tool: list[str], files: list[Path]) -> None:
    command = [str(FOLDER / "node_modules" / ".bin" / tool[0]), *tool[1:], *map(str, files)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_functions_without_a_browser_pass_their_tests_in_node(node_clients: NodeClients) -> None:
    command = ["node", "--test", str(FOLDER / "page.test.mjs")]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*MODULES, *STYLES], ids=lambda path: path.relative_to(STATIC).as_posix())
def test_a_file_is_small_and_says_what_it_has(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= LINES
    assert source.startswith("/*")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(STATIC).as_posix())
def test_the_imports_of_a_module_exist(module: Path) -> None:
    source = module.read_text()
    for name in IMPORT.findall(source):
        assert (module.parent / name).is_file(), name


@pytest.mark.parametrize(
    "path",
    [*MODULES, *STYLES, *PAGES, STATIC / "icon.svg"],
    ids=lambda path: path.relative_to(STATIC).as_posix(),
)
def test_a_file_names_no_other_address(path: Path) -> None:
    addresses = set(re.findall(r"""(?:https?:)?//[\w-]+\.[\w.-]+[^\s"'`)]*""", path.read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_html_is_made_in_one_place() -> None:
    sinks = re.compile(
        r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|parseFromString|setHTMLUnsafe|srcdoc"
        r"|\beval\b|new Function|createContextualFragment|setAttribute\(\s*[\"']on"
    )
    found = [path.name for path in MODULES for _ in sinks.findall(path.read_text())]
    assert found == ["markdown_view.js"]


class Elements(HTMLParser):
    """Keeps all elements with their attributes, and the text in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements = list[tuple[str, dict[str, str | None]]]()
        self.inline = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style"):
            self.inline += data


def test_the_page_has_no_inline_script_or_style_and_its_files_exist() -> None:
    page = Elements((STATIC / "index.html").read_text())
    assert page.inline.strip() == ""
    for tag, attributes in page.elements:
        assert tag not in ("style", "base", "iframe")
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (
            tag,
            attributes,
        )
        url = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
        if url is not None:
            assert url.startswith("page/static/"), "the page must work below a path prefix"
            assert (STATIC / url.removeprefix("page/static/")).is_file(), url


def test_no_file_is_left_over() -> None:
    texts = {path: path.read_text() for path in [*MODULES, *STYLES, *PAGES]}
    for path in [*MODULES, *STYLES]:
        users = [other.name for other, text in texts.items() if other != path and path.name in text]
        assert users, f"nothing uses {path.name}"

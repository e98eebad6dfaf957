"""The page over real HTTP: its files, headers and refusals, the key's usage, and the route for Markdown."""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
from browsers import browser, get_exactly
from gateways import MODEL, Gateway
from server_clients import until

from benchmarks.fake_cog import FakeCog
from llama import ROOT
from llama.gateway.http.page_headers import HEADERS
from llama.gateway.page.files import FOLDER, page_files
from llama.gateway.page.renderer import MAX_CHARACTERS

PACKAGING = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
FILES = sorted(set(page_files()) - {"index.html"})
PATHS = ["/", "/favicon.ico", "/page/session", *(f"/page/static/{name}" for name in FILES[:1])]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for all tests that do not change its settings."""
    with FakeCog() as cog, Gateway([cog.url], tmp_path_factory.mktemp("page") / "gateway.sqlite3") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def anyone(gateway: Gateway) -> httpx2.Client:
    """A client without a key."""
    return gateway.client_of(None)


class TestFiles:
    @pytest.mark.parametrize("path", ["/", *(f"/page/static/{name}" for name in FILES)])
    def test_every_file_of_the_page_is_served_to_anyone(self, anyone: httpx2.Client, path: str) -> None:
        response = anyone.get(path)
        assert response.status_code == 200
        assert (
            response.content
            == (FOLDER / (path.removeprefix("/page/static/").strip("/") or "index.html")).read_bytes()
        )
        assert response.headers["cache-control"] == "no-cache"
        assert_headers(response)
        head = anyone.head(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-type", "content-length", "etag"):
            assert head.headers[name] == response.headers[name]

    @pytest.mark.parametrize(
        ("path", "media_type"),
        [
            ("/", "text/html; charset=utf-8"),
            ("/page/static/app.js", "text/javascript; charset=utf-8"),
            ("/page/static/styles/base.css", "text/css; charset=utf-8"),
            ("/page/static/icon.svg", "image/svg+xml"),
        ],
    )
    def test_files_have_the_types_that_browsers_insist_on(
        self, anyone: httpx2.Client, path: str, media_type: str
    ) -> None:
        assert anyone.get(path).headers["content-type"] == media_type

    @pytest.mark.parametrize("form", ["{}", "W/{}", '"x", {}', '"x",W/{} , "y"'])
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_a_known_version_is_not_sent_again(self, anyone: httpx2.Client, form: str, method: str) -> None:
        etag = anyone.get("/").headers["etag"]
        response = anyone.request(method, "/", headers={"if-none-match": form.format(etag)})
        assert (response.status_code, response.content) == (304, b"")
        assert (response.headers["etag"], response.headers["cache-control"]) == (etag, "no-cache")
        assert_headers(response)

    @pytest.mark.parametrize("known", ['"x"', "", "*x", '"' + "0" * 32 + '"'])
    def test_another_version_is_sent(self, anyone: httpx2.Client, known: str) -> None:
        assert anyone.get("/", headers={"if-none-match": known}).status_code == 200

    def test_the_entity_tag_follows_the_content_and_not_the_time(self, tmp_path: Path) -> None:
        for folder, content in (("a", "1"), ("b", "2"), ("c", "1")):
            (tmp_path / folder / "icons").mkdir(parents=True)
            (tmp_path / folder / "icons" / "x.svg").write_text(content)
        one, other, same = (page_files(tmp_path / folder)["icons/x.svg"].etag for folder in "abc")
        assert one == same != other

    def test_an_editors_copy_is_no_file_of_the_page(self, tmp_path: Path) -> None:
        for name in ("a.js", "a.js~", ".a.js.swp", "a.py", "README", "a.js.orig"):
            (tmp_path / name).write_text("")
        assert set(page_files(tmp_path)) == {"a.js"}

    def test_everything_that_the_page_names_is_one_of_its_files(self, anyone: httpx2.Client) -> None:
        references = References(anyone.get("/").text).found
        assert references
        for reference in references:
            assert reference.removeprefix("page/static/") in FILES, reference
        for name in FILES:
            for imported in re.findall(r"""["'](\.{1,2}/[^"']+\.js)["']""", (FOLDER / name).read_text()):
                assert posixpath.normpath(f"{posixpath.dirname(name)}/{imported}").lstrip("/") in FILES

    def test_a_package_contains_the_files_of_the_page(self, tmp_path: Path) -> None:
        pytest.importorskip("setuptools")
        shutil.copytree(ROOT / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("__pycache__"))
        for path in (*ROOT.glob("requirements*.txt"), *(ROOT / name for name in PACKAGING)):
            shutil.copy(path, tmp_path)
        build = "from setuptools import build_meta; build_meta.build_wheel('.')"
        subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
        (wheel,) = tmp_path.glob("*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        assert {f"llama/gateway/page/static/{name}" for name in (*FILES, "index.html")} <= names


class References(HTMLParser):
    """The addresses of the files that a page loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"script": "src", "link": "href", "img": "src"}.get(tag)
        self.found += [value or "" for name, value in attrs if name == wanted]


class TestRefusals:
    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "..",
            "../",
            "../markdown.py",
            "../../app.py",
            "%2e%2e/markdown.py",
            "%2e%2e%2fmarkdown.py",
            "..%2fmarkdown.py",
            "..%5cmarkdown.py",
            "..\\markdown.py",
            "....//markdown.py",
            "%252e%252e%252fmarkdown.py",
            "..%c0%afmarkdown.py",
            "/etc/passwd",
            "%2fetc%2fpasswd",
            "//etc/passwd",
            "app.js%00",
            "app.js%00.html",
            "app.js/",
            "app.js/x",
            "APP.JS",
            "app.js~",
            "index.html",
            "./index.html",
            "unknown.js",
            "%ff",
            quote(str(FOLDER / "app.js"), safe=""),
        ],
    )
    def test_no_other_file_can_be_read(self, gateway: Gateway, name: str) -> None:
        response = get_exactly(gateway, f"/page/static/{name}")
        # The middleware removes a slash at the end of every path.
        expected = {"app.js/": 200, "": 401, ".": 404}.get(name, 404)
        assert response.status == expected
        assert (
            dict(response.headers.items()).items()
            >= {
                "x-content-type-options": "nosniff",
                "cache-control": "no-cache" if expected == 200 else "no-store",
            }.items()
        )

    @pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/v1", "//v1//"])
    def test_the_root_of_the_api_is_not_the_page(self, gateway: Gateway, path: str) -> None:
        assert get_exactly(gateway, path).status == 401
        response = gateway.client.get(gateway.url + path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"

    @pytest.mark.parametrize(
        ("path", "allowed"),
        [
            ("/", "GET, HEAD"),
            ("/page/static/app.js", "GET, HEAD"),
            ("/page/session", "GET, HEAD"),
            ("/page/login", "POST"),
            ("/page/logout", "POST"),
            ("/page/usage", "GET, HEAD"),
            ("/page/markdown", "POST"),
        ],
    )
    def test_other_methods_are_refused(self, gateway: Gateway, path: str, allowed: str) -> None:
        for method in ("GET", "POST", "PUT", "DELETE"):
            if method not in allowed:
                response = gateway.client.request(method, path)
                assert (response.status_code, response.headers["allow"]) == (405, allowed), method
                assert_headers(response)

    def test_a_browser_that_asks_for_an_icon_is_not_refused(self, anyone: httpx2.Client) -> None:
        response = anyone.get("/favicon.ico")
        assert (response.status_code, response.content) == (204, b"")

    @pytest.mark.parametrize("path", ["/page/usage", "/page/unknown", "/page", "/page/static", "/index.html"])
    def test_other_paths_need_a_key(self, anyone: httpx2.Client, path: str) -> None:
        assert anyone.get(path).status_code == 401
        assert anyone.post("/page/markdown", json={"text": "a"}).status_code == 401

    @pytest.mark.parametrize(
        ("host", "origin"),
        [("evil.example", None), ("127.0.0.1.evil.example", None), ("127.0.0.1", "http://evil.example")],
    )
    def test_an_open_gateway_refuses_other_host_names_and_pages(
        self, cog: FakeCog, gateways: Callable[..., Gateway], host: str, origin: str | None
    ) -> None:
        client = gateways(cog.url, key=None).client_of(None)
        headers = {"host": host} | ({"origin": origin} if origin else {})
        for path in (*PATHS, "/page/usage"):
            response = client.get(path, headers=headers)
            assert response.status_code == 403, path
            assert_headers(response)
        for path in ("/page/login", "/page/logout", "/page/markdown"):
            assert client.post(path, headers=headers, json={"key": "x", "text": "x"}).status_code == 403, path


class TestHeaders:
    def test_the_policy_allows_the_gateways_own_files_and_nothing_else(self, anyone: httpx2.Client) -> None:
        headers = anyone.get("/").headers
        assert headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
            "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        )
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
        assert "clipboard-write" not in headers["permissions-policy"]

    def test_every_response_of_the_page_has_the_headers(self, gateway: Gateway) -> None:
        client = browser(gateway)
        for path in (*PATHS, "/page/usage", "/page/unknown", "/page/static/unknown"):
            assert_headers(client.get(path))
        for path in ("/page/markdown", "/page/login", "/page/logout"):
            assert_headers(client.post(path, json={"text": "a", "key": "wrong"}))

    def test_what_depends_on_the_session_is_not_kept_by_caches(self, gateway: Gateway) -> None:
        client = browser(gateway)
        for path in ("/page/session", "/page/usage"):
            assert client.get(path).headers["cache-control"] == "no-store"
        assert client.post("/page/markdown", json={"text": "a"}).headers["cache-control"] == "no-store"

    def test_the_api_has_none_of_them(self, gateway: Gateway) -> None:
        for path in ("/v1/models", "/healthz", "/v1/predictions"):
            assert not set(HEADERS) & set(gateway.client.get(path).headers)


def assert_headers(response: httpx2.Response) -> None:
    """Every header is there once."""
    for name, value in HEADERS.items():
        assert response.headers.get_list(name) == [value], (response.request.url, name)


class TestMarkdown:
    def test_markdown_is_rendered_for_a_key_and_for_a_session(self, gateway: Gateway) -> None:
        for client in (gateway.client, browser(gateway)):
            response = client.post("/page/markdown", json={"text": "*a* <script>"})
            assert response.status_code == 200
            assert response.json() == {"html": "<p><em>a</em> &lt;script&gt;</p>\n"}

    @pytest.mark.parametrize("body", [b"[]", b"{}", b'{"text": null}', b'{"text": 1}', b'"text"'])
    def test_a_body_without_a_text_is_refused(self, gateway: Gateway, body: bytes) -> None:
        response = gateway.client.post("/page/markdown", content=body)
        assert response.status_code == 422
        assert response.json()["detail"] == "The body must be a JSON object whose member `text` is a string."
        assert gateway.client.post("/page/markdown", content=b"*a*").status_code == 400

    def test_a_long_text_is_refused(self, gateway: Gateway) -> None:
        response = gateway.client.post("/page/markdown", json={"text": "é" * MAX_CHARACTERS})
        assert response.status_code == 200
        response = gateway.client.post("/page/markdown", json={"text": "é" * (MAX_CHARACTERS + 1)})
        assert response.status_code == 413
        assert (
            response.json()["detail"] == "`text` has 100001 characters, but at most 100000 can be rendered."
        )

    def test_a_text_that_takes_too_long_is_refused_while_others_are_served(self, gateway: Gateway) -> None:
        response = gateway.client.post("/page/markdown", json={"text": "![" * (MAX_CHARACTERS // 2)})
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "text_too_complex"
        assert gateway.client.post("/page/markdown", json={"text": "a"}).json() == {"html": "<p>a</p>\n"}

    def test_too_many_texts_of_one_key_are_refused(self, gateway: Gateway) -> None:
        def render(text: str) -> httpx2.Response:
            return gateway.client.post("/page/markdown", json={"text": text})

        with ThreadPoolExecutor(13) as threads:
            slow = threads.submit(render, "![" * (MAX_CHARACTERS // 2))
            responses = list(threads.map(render, ["a"] * 12))
            assert slow.result().status_code == 422
        assert {response.status_code for response in responses} == {200, 429}
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "2"


class TestUsage:
    def test_a_new_key_has_used_nothing(self, gateway: Gateway) -> None:
        client = browser(gateway, gateway.add_key("new"))
        before = datetime.now(UTC)
        usage = client.get("/page/usage").json()
        after = datetime.now(UTC)  # the month may end meanwhile
        assert usage.pop("since") in {f"{time:%Y-%m}-01" for time in (before, after)}
        assert usage == {
            "rows": [],
            "total": {"predictions": 0, "input_tokens": 0, "output_tokens": 0, "seconds": 0, "price": 0},
            "budget": None,
        }

    def test_a_key_sees_its_own_usage_and_its_price(self, gateway: Gateway) -> None:
        key = gateway.add_key("ann", monthly_tokens=10**6, monthly_dollars=Decimal("0.5"))
        client, other = browser(gateway, key), browser(gateway)
        for each in (client, client, other):
            gateway.create(client=each, prefer="wait")
        ended = [p for p in client.get("/v1/predictions").json()["results"] if p["status"] == "succeeded"]
        tokens = [
            sum(client.get(f"/v1/predictions/{p['id']}").json()["metrics"][name] for p in ended)
            for name in COUNTS
        ]
        assert len(ended) == 2
        assert all(tokens)
        until(lambda: client.get("/page/usage").json()["total"]["predictions"] == 2)
        usage = client.get("/page/usage").json()
        (row,) = usage["rows"]
        assert (row["model"], row["predictions"]) == (MODEL, 2)
        assert [row["input_tokens"], row["output_tokens"]] == tokens
        price = (tokens[0] * Decimal("0.65") + tokens[1] * Decimal("2.75")) / 10**6
        assert row["price"] == usage["total"]["price"] == float(price)
        assert row["seconds"] > 0
        assert usage["total"] == {name: row[name] for name in usage["total"]}
        assert usage["budget"] == {
            "tokens": 10**6,
            "dollars": 0.5,
            "tokens_used": sum(tokens),
            "dollars_used": float(price),
        }

    def test_usage_begins_on_the_day_that_is_asked_for(self, gateway: Gateway) -> None:
        client = browser(gateway)
        gateway.create(client=client, prefer="wait")
        until(lambda: client.get("/page/usage").json()["total"]["predictions"])
        tomorrow = (datetime.now(UTC).date() + timedelta(days=2)).isoformat()
        assert client.get("/page/usage", params={"since": tomorrow}).json()["rows"] == []
        long_ago = client.get("/page/usage", params={"since": "2020-02-29"}).json()
        assert (long_ago["since"], len(long_ago["rows"]) > 0) == ("2020-02-29", True)

    @pytest.mark.parametrize(
        "since", ["", "yesterday", "2025-02-30", "2025-1-1", "2025-01-01T00:00:00Z", "1e9"]
    )
    def test_a_day_that_cannot_be_read_is_refused(self, gateway: Gateway, since: str) -> None:
        response = gateway.client.get("/page/usage", params={"since": since})
        assert response.status_code == 400
        assert response.json()["detail"] == "`since` must be a day such as 2025-01-31."


COUNTS = ("input_token_count", "output_token_count")


def test_the_page_shows_a_prediction_at_the_address_that_the_api_gives(gateway: Gateway) -> None:
    prediction = gateway.create()
    assert prediction["urls"]["web"] == f"{gateway.url}/#/predictions/{prediction['id']}"


def test_the_address_of_the_page_keeps_the_path_of_the_public_url(
    cog: FakeCog, gateways: Callable[..., Gateway]
) -> None:
    prediction = gateways(cog.url, public_url="https://gw.example/llama/").create()
    assert prediction["urls"]["web"] == f"https://gw.example/llama/#/predictions/{prediction['id']}"

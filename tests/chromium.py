"""A real Chromium for the tests of the gateway's page.

A visit is a browser profile with the page open. It records what must never happen: a request to any other
address, a message on the console, an error that no script caught, a dialog. Knows nothing about what the
page shows; `page_user.py` does.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import (
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Error,
    Request,
    expect,
    sync_playwright,
)

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ON_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
_TIMEOUT = 20_000.0  # milliseconds
_OWN = re.compile(r"(http://(127\.0\.0\.1|localhost)(:\d+)?/|data:|blob:|about:)")
_ARGUMENTS = [
    "--disable-gpu",
    "--disable-gpu-compositing",
    "--disable-software-rasterizer",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
    "--no-first-run",
    "--no-pings",
    # Nothing listens there, so that nothing but loopback can be reached. Playwright could refuse requests too,
    # but would then slow down all of them.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=127.0.0.1;localhost",
]

Theme = Literal["light", "dark"]


@dataclass(frozen=True)
class Screen:
    """The size of the window, in CSS pixels."""

    name: str
    width: int
    height: int
    is_phone: bool = False


DESKTOP = Screen("desktop", 1280, 800)
PHONE = Screen("phone", 390, 844, is_phone=True)


def find_chromium() -> str:
    """Return the path of a browser. Without one, the test is skipped; where CI is set, it fails."""
    for candidate in (os.environ.get("CHROMIUM"), *map(shutil.which, _NAMES), shutil.which(_ON_MACOS)):
        if candidate:
            return candidate
    reason = (
        f"None of {', '.join(_NAMES)} is on the PATH, so the page cannot be tested. Install Chromium "
        "(Debian: `apt install chromium`), or set CHROMIUM to the path of a browser."
    )
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Visit:
    """A browser profile in which the page is open. `Chromium.visit` returns one."""

    def __init__(self, context: BrowserContext, screen: Screen) -> None:
        self.context, self.screen = context, screen
        self.url = ""
        """The page's address, without a slash at the end."""
        self.problems = list[str]()
        """What must not happen but did."""
        self._allowed = list[str]()
        context.set_default_timeout(_TIMEOUT)
        context.on("request", self._requested)
        context.on("console", self._logged)
        context.on("weberror", lambda error: self.problems.append(f"error: {error.error}"))
        context.on("dialog", self._dialog_opened)
        self.page = context.new_page()

    def begin(self, url: str, theme: Theme) -> None:
        self.url = url
        self.problems.clear()
        self._allowed.clear()
        self.page.emulate_media(color_scheme=theme)

    def _requested(self, request: Request) -> None:
        if not _OWN.match(request.url):
            self.problems.append(f"request: {request.url[:200]}")

    def _logged(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text} ({message.location['url'][:200]})")

    def _dialog_opened(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, address: str = "") -> Self:
        """Show an address of the page, such as "#/usage"."""
        self.page.goto(f"{self.url}/{address}")
        return self

    def log_in(self, key: str) -> Self:
        """Get a session without the form."""
        address = urlsplit(self.url)
        response = self.context.request.post(
            f"{self.url}/page/login",
            data={"key": key},
            headers={"Origin": f"{address.scheme}://{address.netloc}"},
        )
        assert response.status == 204, response.text()
        return self

    def allow_status(self, *statuses: int) -> None:
        """Expect the browser's message on the console about a response with one of these statuses."""
        self._allowed += [f"responded with a status of {status} " for status in statuses]

    def allow_lost_connections(self) -> None:
        """Expect the browser's messages about connections that were closed or refused."""
        self._allowed.append("Failed to load resource: net::ERR_")

    def end(self) -> None:
        """Leave the page and forget everything. Fails if anything happened that must not happen."""
        self.page.evaluate("() => localStorage.clear()")  # the events until now have then arrived
        unexpected = [p for p in self.problems if not any(allowed in p for allowed in self._allowed)]
        assert not unexpected, unexpected
        for page in self.context.pages[1:]:
            page.close()
        self.page.unroute_all(behavior="ignoreErrors")
        self.context.unroute_all(behavior="ignoreErrors")
        self.context.clear_permissions()
        self.page.goto("about:blank")
        self.context.clear_cookies()


class Chromium:
    """A context manager that runs one browser and closes all visits.

    Playwright occupies the event loop of the thread: nothing else can use asyncio there meanwhile.
    """

    def __init__(self) -> None:
        self._path = find_chromium()
        self._unused = dict[Screen, Visit]()

    def __enter__(self) -> Self:
        self._driver = sync_playwright().start()
        try:
            self._browser = self._driver.chromium.launch(
                executable_path=self._path, args=_ARGUMENTS, chromium_sandbox=os.geteuid() != 0
            )
        except Error:
            self._driver.stop()
            raise
        expect.set_options(timeout=_TIMEOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.close()
        self._driver.stop()

    @contextmanager
    def visit(self, url: str, screen: Screen = DESKTOP, theme: Theme = "light") -> Iterator[Visit]:
        """Use a profile in which nothing is stored. Profiles are used again, because making one takes longer
        than most tests."""
        visit = self._unused.pop(screen, None) or self._new(screen)
        try:
            visit.begin(url, theme)
            yield visit
            visit.end()
        except BaseException:
            visit.context.close()
            raise
        self._unused[screen] = visit

    def _new(self, screen: Screen) -> Visit:
        context = self._browser.new_context(
            viewport={"width": screen.width, "height": screen.height},
            has_touch=screen.is_phone,
            is_mobile=screen.is_phone,
            reduced_motion="reduce",
            locale="en-US",
        )
        return Visit(context, screen)

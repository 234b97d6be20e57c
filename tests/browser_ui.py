"""The web UI as a person has it: `detour ui` really started, and its pages in Debian's Chromium.

    ui = Ui(folder); ui.start()
    visit = ui.visit(browser, PHONE); visit.open(ui.link); visit.page.get_by_role(...)
    visit.fine()      # nothing broken, nothing asked of other machines, nothing wider than the window

Pages allow no `eval`, so that playwright's `wait_for_function` does not work on them: wait for elements.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from detour.jobs import processes
from detour.jobs.store import Store
from queueing import until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

REQUIRED = "DETOUR_BROWSER"
"""`required` in the environment: tests that cannot have a browser fail instead of being skipped."""
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_LINK = r"http://\S+/login\?code=\S+"
_PATIENCE = 60_000  # milliseconds, on a machine where much else is going on

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 780}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
}  # fmt: skip


# --- the browser ------------------------------------------------------------------------------------------------------


def program() -> str | None:
    """Where Chromium is."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)


def why_none() -> str:
    """Why there is no browser, in words; empty if there is one."""
    if find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright (it comes with detour[dev])"
    if program() is None:
        return f"no Chromium ({', '.join(_PROGRAMS)}) in PATH: apt-get install chromium"
    return ""


@contextmanager
def opened() -> Iterator[Browser]:
    """Chromium without a window. Where there is none the test is skipped, or fails if a browser is required."""
    if reason := why_none():
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(f"{REQUIRED}=required, but {reason}", pytrace=False)
        pytest.skip(f"tests in a browser need one: {reason}")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=_PATIENCE)
    # Its sandbox does not work for root, whom containers run tests as; it sees nothing but our own pages. No name but
    # the server's leads anywhere: what a page asks of others fails, on machines with a network too.
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """A browser's tab, and everything that went wrong in it."""

    page: Page
    address: str
    """The server's, without a slash at its end."""
    wrong: list[str] = field(default_factory=list)
    forgiving: bool = False
    """While the server is killed: its silence is no mistake of a page."""

    def listen(self) -> None:
        """Take note of what goes wrong from now on."""
        self.page.set_default_timeout(_PATIENCE)
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation', (event) =>"
            " console.error(`CSP: ${event.violatedDirective} ${event.blockedURI}`))"
        )
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.note(_said(said)))
        self.page.on("pageerror", lambda error: self.note(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("response", lambda answer: answer.status >= 400 and self.note(f"{answer.status}: {answer.url}"))
        self.page.on("requestfailed", lambda request: self._failed(request.url, request.failure))

    def note(self, what: str) -> None:
        """Something went wrong."""
        if not self.forgiving:
            self.wrong.append(f"{urlsplit(self.page.url).path}: {what}")

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and f"{parts.scheme}://{parts.netloc}" != self.address:
            self.wrong.append(f"asked another machine: {url}")

    def _failed(self, url: str, failure: str | None) -> None:
        if failure != "net::ERR_ABORTED":  # a page was left, or its question became out of date
            self.note(f"{failure}: {url}")

    def open(self, address: str) -> None:
        """Go to a page, by its path."""
        self.page.goto(address if "//" in address else self.address + address)

    def log_in(self, link: str) -> None:
        """By a login link: it leads to the jobs, and is not kept in the history."""
        self.open(link)
        self.page.wait_for_url("**/jobs")

    def fine(self, where: str = "") -> None:
        """What every page has to be, in whatever state."""
        assert not self.wrong, "\n".join(self.wrong)
        wide = self.page.evaluate(_WIDE)
        assert not wide, f"{where or self.page.url} is wider than the window: {wide}"

    def reachable(self) -> None:
        """Whatever can be clicked can be scrolled to, and nothing lies over it."""
        covered = self.page.evaluate(_COVERED)
        assert not covered, f"{self.page.url}: covered or out of reach: {covered}"

    def tab_to(self, target: Locator, most: int = 150) -> None:
        """Press Tab until something has the focus, which must be seen."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if target.evaluate("(one) => one === document.activeElement"):
                style = target.evaluate(
                    "(one) => getComputedStyle(one).outlineStyle + ' ' + getComputedStyle(one).outlineWidth"
                )
                assert style == "solid 3px", f"the focus is not seen: {style}"
                return
        raise AssertionError(f"{target} is not reached with {most} times Tab")

    def close(self) -> None:
        """Close the tab."""
        self.page.context.close()


def _said(said: ConsoleMessage) -> str:
    return f"{said.type}: {said.text} ({said.location['url']})"


# What sticks out of the window to the right, of elements that do not lie in something that scrolls by itself.
_WIDE = """() => {
  const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  const scrolls = (one) => one && one !== document.body && one !== root
    && (getComputedStyle(one).overflowX !== 'visible' || scrolls(one.parentElement));
  return [`${root.scrollWidth} of ${root.clientWidth} px`, ...[...document.querySelectorAll('body *')]
    .filter((one) => one.getBoundingClientRect().right > root.clientWidth + 1 && !scrolls(one.parentElement))
    .map((one) => `${one.tagName}#${one.id}.${one.className}`).slice(0, 5)];
}"""

_COVERED = """() => [...document.querySelectorAll('a[href], button, input, select, textarea, summary')]
  .filter((one) => !one.disabled && one.checkVisibility() && !one.matches('.skip, .unseen'))
  .filter((one) => {
    one.scrollIntoView({ block: 'center', inline: 'center', behavior: 'instant' });
    const box = one.getClientRects()[0];
    const hit = box && document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
    return box && !(hit && (one.contains(hit) || hit.contains(one) || hit.control === one));
  }).map((one) => `${one.tagName}#${one.id} ${one.ariaLabel ?? one.textContent}`.trim()).slice(0, 5)"""


# --- the server -------------------------------------------------------------------------------------------------------


class Ui:
    """`detour ui` for a folder, and everything that is started from its pages."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.port = _free_port()
        place = ["--port", str(self.port), "--folder", str(folder)]
        self.command = [sys.executable, "-P", "-m", "detour", "ui", "--no-browser", *place, *options]
        self.link = ""
        self.process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait for the line with the login link."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "ui.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(_LINK, line)
        assert found, line + (self.folder / "ui.log").read_text()
        self.link = found[0]

    def fresh_link(self) -> str:
        """A login link for another browser, as `detour ui` shows it when the folder has its UI already."""
        said = subprocess.run(self.command, check=False, capture_output=True, text=True).stderr
        found = re.search(_LINK, said)
        assert found, said
        return found[0]

    def stop(self) -> str:
        """As by Ctrl-C; returns what it has complained of so far."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
        return (self.folder / "ui.log").read_text()

    def kill(self) -> None:
        """As by `kill -9`."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def visit(self, browser: Browser, window: dict[str, Any], **more: Any) -> Visit:
        """A tab in a browser that knows nothing yet."""
        visit = Visit(browser.new_context(**window, **more).new_page(), self.address)
        visit.listen()
        return visit

    @contextmanager
    def store(self) -> Iterator[Store]:
        """The queue's store, beside the server."""
        store = Store(self.folder)
        try:
            yield store
        finally:
            store.close()

    def look(self, of: Callable[[Store], Any], what: str, within: float = 60.0) -> Any:
        """Wait until the store says something that is not empty."""
        with self.store() as store:
            return until(lambda: of(store), what, within)

    def end(self) -> None:
        """End the server, the worker and every job of this folder."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        with self.store() as store:
            for job in store.jobs(("queued", "starting")):
                store.ask_stop(job.id)
            for one in [store.worker(), *(job.process for job in store.jobs())]:
                if one is not None:
                    processes.send(one, signal.SIGKILL)


def _free_port() -> int:
    """One that stays the same when the server is started again, as it does for those who use the default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

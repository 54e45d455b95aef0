"""Pages in headless Chromium: opened, driven by keys, looked at. Speaks to it through two pipes, without a package.

``open_page(path, width=390, dark=True, script="document.title")`` opens a page, runs a script in it and closes it;
``Browser().page(path)`` is a page that is pressed and asked step by step. Where no Chromium is, tests skip:
``pytestmark = needs_chromium``.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "Page", "PageResult", "chromium", "needs_chromium", "open_page", "shared"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: What keys are called, where that is not the letter that they write.
CODES = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "PageUp": 33,
    "PageDown": 34, "Tab": 9, "Enter": 13, "Escape": 27, " ": 32,
}  # fmt: skip


def chromium() -> str | None:
    """The program, or ``None`` where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(chromium() is None, reason="there is no Chromium to show the page in")


@dataclass
class PageResult:
    """What a page has said.

    Attributes:
        console: warnings and errors of its console, exceptions and failed requests among them.
        value: what the script returned, after JSON.
        screenshot: a PNG.
    """

    console: list[str]
    value: Any
    screenshot: bytes


@dataclass
class Page:
    """A page that is open.

    Attributes:
        console: warnings and errors so far.
        requests: the addresses that it has asked for, its own first.
    """

    browser: Browser
    session: str
    target: str
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol."""
        return self.browser.ask(method, session=self.session, **params)

    def run(self, script: str) -> Any:
        """The value of an expression, after JSON; promises are waited for.

        Raises:
            RuntimeError: if the script throws.
        """
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(_thrown(found["exceptionDetails"]))
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """The first value of an expression that is true.

        Raises:
            TimeoutError: if it does not come to be.
        """
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise TimeoutError(f"the page does not come to {script}; its console: {self.console}")
            time.sleep(0.02)
        return value

    def press(self, *keys: str) -> None:
        """Press keys one after the other: ``"ArrowRight"``, ``" "``, ``"a"``."""
        for key in keys:
            named = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": CODES.get(key, 0)}
            text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
            self.ask("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **named, **text)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **named)

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse."""
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        """Another size of the window; one of up to 480 pixels is a phone's."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width <= 480
        )

    def dark(self, on: bool = True) -> None:
        """Whether the person prefers dark pages."""
        value = "dark" if on else "light"
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, whole: bool = True) -> bytes:
        """A PNG of the whole page, or of what is in the window."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def hears(self, event: dict[str, Any]) -> None:
        """Note what the browser tells of the page."""
        method, told = event["method"], event.get("params", {})
        if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.console.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(_thrown(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.console.append(f"{told['entry']['text']} {told['entry'].get('url', '')}".strip())
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])


class Browser:
    """A Chromium without a window.

    Raises:
        RuntimeError: if there is none, or it does not answer.
    """

    def __init__(self) -> None:
        program = chromium()
        if program is None:
            raise RuntimeError(f"there is no Chromium: none of {', '.join(NAMES)} is installed")
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        (self._from_us, self._to_it), (self._from_it, self._from_it_end) = os.pipe(), os.pipe()
        arguments = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-extensions", "--disable-background-networking",
            "--disable-component-update", "--force-color-profile=srgb", f"--user-data-dir={self._folder}",
            "about:blank",
        ]  # fmt: skip
        # It reads commands from descriptor 3 and writes answers to 4: a shell puts them there, whatever ours are.
        redirected = f'exec "$@" 3<&{self._from_us} 4>&{self._from_it_end}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, "chromium", *arguments],
            pass_fds=(self._from_us, self._from_it_end), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(self._from_us)
        os.close(self._from_it_end)
        self._number, self._rest = 0, b""
        self._pages: dict[str, Page] = {}

    def ask(self, method: str, session: str | None = None, seconds: float = 60.0, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._to_it, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + seconds
        while True:
            heard = self._next(end - time.monotonic(), method)
            if heard.get("id") == self._number:
                if "error" in heard:
                    raise RuntimeError(f"{method}: {heard['error']['message']}")
                return heard["result"]
            if "method" in heard and heard.get("sessionId") in self._pages:
                self._pages[heard["sessionId"]].hears(heard)

    @contextmanager
    def page(
        self, path: Path | str, width: int = 1280, height: int = 900, dark: bool = False, ready: str | None = None
    ) -> Iterator[Page]:
        """A page of a file or an address (with ``#fragment``, if wanted) that has loaded.

        Args:
            path: the file or address.
            width, height: of the window.
            dark: whether the person prefers dark pages.
            ready: an expression that becomes true when the page is ready.
        """
        address, _, fragment = str(path).partition("#")
        if "://" not in address and not address.startswith("about:"):
            address = Path(address).resolve().as_uri()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.ask(f"{domain}.enable")
            page.resize(width, height)
            page.dark(dark)
            page.ask("Page.navigate", url=f"{address}#{fragment}" if fragment else address)
            page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
            if ready is not None:
                page.wait(ready)
            yield page
        finally:
            del self._pages[session]
            self.ask("Target.closeTarget", targetId=target)

    def close(self) -> None:
        """End it, and everything that it has started."""
        if self._process.poll() is None:
            try:
                self.ask("Browser.close", seconds=5)
                self._process.wait(5)
            except (RuntimeError, TimeoutError, OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for descriptor in (self._to_it, self._from_it):
            os.close(descriptor)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _next(self, seconds: float, method: str) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._from_it], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium does not answer {method}")
            more = os.read(self._from_it, 1 << 20)
            if not more:
                raise RuntimeError(f"Chromium has ended before it answered {method}")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@lru_cache(maxsize=1)
def shared() -> Browser:
    """One for all tests of a process: it takes a second to start. It ends with the process."""
    browser = Browser()
    atexit.register(browser.close)
    return browser


def open_page(
    path: Path | str,
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
    script: str = "null",
    ready: str | None = None,
    whole: bool = True,
) -> PageResult:
    """Open a page, run a script, take a picture.

    Args:
        path: a file or an address, perhaps with a fragment.
        width, height: of the window.
        dark: whether the person prefers dark pages.
        script: an expression; a promise is waited for.
        ready: an expression that becomes true when the page is ready.
        whole: whether the picture is of the whole page or of what is in the window.
    """
    with shared().page(path, width, height, dark, ready) as page:
        value = page.run(script)
        return PageResult(page.console, value, page.screenshot(whole))


def _thrown(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details.get("text"))

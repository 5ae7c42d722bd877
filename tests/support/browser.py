"""Debian's Chromium, driven by Playwright, without the network use of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["CHROMIUM", "Visit", "chromium", "visiting"]

CHROMIUM = shutil.which("chromium")
"""Where it is; None where it is not installed: `make browser`."""

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
READY_MS = 60_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that was opened, and what it said and asked for since.

    Attributes:
        page: The page.
        errors: Lines on its console, and errors that nobody caught.
        requests: Addresses that it asked for.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def visiting(
    browser: Browser, url: str, *, width: int = 1280, scheme: Literal["light", "dark"] = "light", wait: bool = True
) -> Iterator[Visit]:
    """Open a page, and wait until it has drawn itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(READY_MS)
    visit = Visit(page)
    page.on("console", lambda message: visit.errors.append(message.text))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.on("request", lambda request: visit.requests.append(request.url))
    page.goto(url)
    if wait:
        page.wait_for_selector("html[data-ready]", state="attached")
    yield visit
    context.close()

"""A headless Chromium for tests of pages: Debian's, driven by Playwright.

    def test_a_page(browser: Browser) -> None:
        with open_page(browser, "http://127.0.0.1:8080/", color_scheme="dark") as page:
            page.get_by_role("button", name="Pause").click()

``browser`` is a fixture of tests/conftest.py. Scripts that take pictures say
``with launched() as browser``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 60_000
"""Longest wait for something on a page, on a busy machine."""
SIZE = (1280, 900)
"""Of the window, in CSS pixels."""


def find_chromium() -> Path | None:
    """The program, or None where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return Path(found) if found else None


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
    """A browser. Raises FileNotFoundError where Chromium is absent."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError("there is no chromium; make apt-tools installs it")
    with sync_playwright() as playwright:
        # A container's root may not use Chromium's sandbox, and its /dev/shm is small.
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(
    browser: Browser, address: str, *, size: tuple[int, int] = SIZE, **options: Any
) -> Iterator[Page]:
    """A page in a window of its own, with nothing kept from other windows.

    ``options`` are those of ``Browser.new_context``, such as ``color_scheme``. Raises
    AssertionError at the end for an error that a script of the page did not catch.
    """
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    context.set_default_timeout(WAIT_MS)
    try:
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page
        assert errors == [], "\n".join(errors)
    finally:
        context.close()

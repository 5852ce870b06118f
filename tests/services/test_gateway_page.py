"""The page /docs in a browser: it shows every call, sends one, and asks nobody but its server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Request
from tests.browser import open_page
from tests.services.http_client import HttpPort, serving_reward

pytestmark = pytest.mark.services

PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def port(tiny_reward_folder: Path) -> Iterator[HttpPort]:
    with serving_reward(tiny_reward_folder) as (_, port):
        yield port


def test_the_page_shows_every_call_and_message_and_asks_nobody_else(
    port: HttpPort,
    browser: Browser,
) -> None:
    document = port.get("/openapi.json").json
    paths = [path for path, verbs in document["paths"].items() for _ in verbs]
    names = list(document["components"]["schemas"])
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    with open_page(browser, "about:blank") as page:
        page.on("request", note)
        page.goto(f"http://127.0.0.1:{port.port}/docs")
        page.locator("#Health").wait_for()
        shown = page.locator("details > summary > code").all_inner_texts()
        assert shown == [*paths, *names]
        page.locator("summary", has_text="/v1/score").first.click()
        page.get_by_role("button", name="Send").first.click()
        page.get_by_text("ITEM_STATUS_CODE_OK").first.wait_for()
        page.get_by_role("link", name="ScoreRequest").first.click()
        page.locator("#ScoreRequest[open]").wait_for()
    hosts = {urlsplit(address).netloc for address in asked}
    assert hosts == {f"127.0.0.1:{port.port}"}
    assert any(address.endswith("/v1/score") for address in asked)


@pytest.mark.parametrize("size", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_the_page(
    port: HttpPort,
    browser: Browser,
    size: tuple[int, int],
    scheme: str,
) -> None:
    address = f"http://127.0.0.1:{port.port}/docs"
    with open_page(browser, address, size=size, color_scheme=scheme, bypass_csp=True) as page:
        page.locator("#Health").wait_for()
        page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
        found = Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()

"""The page of kleash report in Chromium: light and dark, by keyboard, and for screen readers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from tests.browser import open_page
from tests.run_folders import write_run

from kleash.cli.main import main

pytestmark = pytest.mark.e2e

NUM_STEPS = 12
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a report of two configurations, one of them with two seeds."""
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for name, seed, beta in (("a", 0, 0.1), ("b", 1, 0.1), ("c", 0, 0.02)):
        steps = range(NUM_STEPS)
        score = [math.sqrt(step) + seed + beta for step in steps]
        figures = {"score_mean": score, "kl_per_sequence": [float(step) for step in steps]}
        judge = {"evaluation/score_mean": score, "evaluation/judge/total": score[::-1]}
        judge["evaluation/kl_per_sequence"] = [float(step) for step in steps]
        path = write_run(
            folder / name,
            figures,
            evaluations=judge,
            num_samples=2,
            seed=seed,
            kl={"coefficient": beta},
        )
        runs.append(str(path))
    out = folder / "report.html"
    assert main(["report", *runs, f"--out={out}"]) == 0
    return out.as_uri()


@pytest.fixture(params=THEMES)
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    """The page in either theme; a message in its console or a request beside itself fails."""
    messages: list[str] = []
    requests: list[str] = []
    with open_page(browser, "about:blank", color_scheme=request.param) as its:
        its.on("console", lambda message: messages.append(message.text))
        its.on("request", lambda made: requests.append(made.url))
        its.goto(address)
        yield its
    assert messages == []
    assert set(requests) == {address}


def background(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def brightness(page: Page) -> float:
    return sum(map(int, re.findall(r"\d+", background(page))[:3])) / 3


def test_theme_follows_the_system_and_the_switch(page: Page) -> None:
    is_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (brightness(page) < 80) is is_dark
    other = "Light" if is_dark else "Dark"
    page.get_by_role("radio", name=other).check(force=True)
    assert (brightness(page) < 80) is not is_dark
    page.reload()
    assert (brightness(page) < 80) is not is_dark, "the choice is remembered"
    page.get_by_role("radio", name="System").check(force=True)
    assert (brightness(page) < 80) is is_dark


def test_every_section_has_its_content(page: Page) -> None:
    assert page.locator("main > section > h2").all_inner_texts() == [
        "Overview",
        "Reward-hacking watch",
        "Curves",
        "Final figures",
        "Samples",
        "Versions of the weights",
        "Runs",
    ]
    assert page.locator("#watch .suspect").count() >= 2, "the judge falls in both groups"
    bands = page.locator("#chart-score_mean .band")
    assert bands.count() == 1, "one group has two seeds"
    box = bands.first.bounding_box()
    assert box is not None
    assert box["height"] > 20


def test_a_chart_is_read_with_the_keyboard(page: Page) -> None:
    scrub = page.locator("#chart-score_mean .scrub")
    scrub.focus()
    page.keyboard.press("End")
    readout = page.locator("#chart-score_mean .readout").inner_text()
    assert readout.startswith(f"at {NUM_STEPS}")
    # sqrt(11) + 0.1 and + 1.1, mean 3.917; and + 0.02.
    assert "3.917 (3.417 to 4.417)" in readout
    assert "3.337" in readout
    assert "kl.coefficient=0.1 3.917" in (scrub.get_attribute("aria-valuetext") or "")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chart-score_mean .readout").inner_text().startswith("at 11")


def test_the_pointer_reads_a_chart(page: Page) -> None:
    chart = page.locator("#chart-kl_per_sequence .chart")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 16, box["y"] + box["height"] / 2)
    assert page.locator("#chart-kl_per_sequence .readout").inner_text().startswith("at 12")


def test_tokens_are_coloured_by_reward_by_kl_and_not_at_all(page: Page) -> None:
    token = page.locator(".sample .token").first
    reward = _colour(page)
    assert "less" in (token.get_attribute("class") or ""), "-beta times KL"
    page.get_by_role("radio", name="KL").check(force=True)
    assert "more" in (token.get_attribute("class") or "")
    assert _colour(page) != reward
    assert page.locator("#scale").inner_text().startswith("KL of a token, nats")
    page.get_by_role("radio", name="Nothing").check(force=True)
    assert _colour(page) == "rgba(0, 0, 0, 0)"


def _colour(page: Page) -> str:
    return page.evaluate(
        "getComputedStyle(document.querySelector('.sample .token')).backgroundColor"
    )


def test_tokens_are_read_with_the_arrow_keys(page: Page) -> None:
    page.locator("#sample-step").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    sample = page.locator(".sample").first
    readout = sample.locator(".readout")
    assert '"I"' in readout.inner_text()
    page.keyboard.press("ArrowRight")
    text = readout.inner_text()
    assert 'token 2 of 9 " cannot"' in text
    assert "reward \N{MINUS SIGN}0.03" in text
    assert "KL 0.3" in text
    assert f"weights version {NUM_STEPS}" in text
    page.keyboard.press("End")
    assert "reward 0.75" in readout.inner_text()
    page.keyboard.press("Tab")
    in_second = page.evaluate(
        "document.querySelectorAll('.sample')[1].contains(document.activeElement)"
    )
    assert in_second, "a response is one stop of the tab key"


def test_another_run_and_step(page: Page) -> None:
    page.locator("#sample-run").select_option(label="c")
    page.locator("#sample-step").select_option(label="1")
    assert page.locator(".sample h3").first.inner_text().startswith("Response 1")
    assert "step 1" in page.locator(".sample h3").first.inner_text()
    assert page.locator(".sample").count() > 0


def test_texts_of_prompts_are_text(page: Page) -> None:
    assert "May I & <b>0</b>?" in page.locator(".sample .prompt").first.inner_text()


def test_tab_reaches_every_control_and_shows_where_it_is(page: Page) -> None:
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(() => { const it = document.activeElement;"
                "return it.textContent.trim() || it.value; })()"
            )
        )
    assert reached[0] == "Skip to the report"
    assert reached[1] == "system"
    assert reached[2:9] == [
        "Overview",
        "Reward hacking",
        "Curves",
        "Final figures",
        "Samples",
        "Weights",
        "Runs",
    ]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_nothing_moves_where_motion_is_not_wanted(browser: Browser, address: str) -> None:
    with open_page(browser, address, reduced_motion="reduce") as page:
        scroll = "getComputedStyle(document.documentElement).scrollBehavior"
        assert page.evaluate(scroll) == "auto"
    with open_page(browser, address, reduced_motion="no-preference") as page:
        assert page.evaluate(scroll) == "smooth"


@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing(browser: Browser, address: str, theme: str, width: int) -> None:
    # The page's policy keeps axe out, as every other script.
    with open_page(
        browser, address, size=(width, 900), color_scheme=theme, bypass_csp=True
    ) as page:
        for details in page.locator("#chart-score_mean details, #runs details").all():
            details.evaluate("it => { it.open = true; }")
        for colour in ("Reward", "KL"):
            page.get_by_role("radio", name=colour).check(force=True)
            results = Axe().run(page)
            assert results.violations_count == 0, results.generate_report()
            assert len(results.response["passes"]) > 20, "axe looked at the page"


def test_a_page_wider_than_the_window_does_not_scroll_sideways(
    browser: Browser,
    address: str,
) -> None:
    with open_page(browser, address, size=(380, 800)) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_printed_page_has_no_controls(browser: Browser, address: str) -> None:
    with open_page(browser, address) as page:
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()


def test_report_of_a_run_that_has_just_begun(
    browser: Browser,
    tmp_path: Path,
) -> None:
    path = write_run(tmp_path / "run", {"score_mean": [0.5]}, is_complete=False)
    assert main(["report", str(path)]) == 0
    with open_page(browser, (path / "run-report.html").as_uri(), bypass_csp=True) as page:
        assert page.locator("#chart-score_mean .dot").count() == 1
        assert Axe().run(page).violations_count == 0

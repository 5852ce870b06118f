"""The live page in a browser: steps arrive, buttons steer, restarts are noticed, tokens asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.browser import open_page
from tests.services.doubler import free_port
from tests.services.live_run import LiveRun, serving_run

from kleash.ppo.control import RunState
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services


@pytest.fixture
def run() -> Iterator[LiveRun]:
    run = LiveRun()
    yield run
    run.end()


@pytest.fixture
def page(browser: Browser, run: LiveRun) -> Iterator[Page]:
    port = free_port()
    with serving_run(run, http_port=port):
        with open_page(browser, f"http://127.0.0.1:{port}/") as page:
            expect_step(page, 3)
            yield page
        run.end()


def expect_fact(page: Page, name: str, value: str) -> None:
    expect(page.locator("#facts div", has_text=name).locator("dd")).to_have_text(value)


def expect_step(page: Page, step: int) -> None:
    expect(page.locator("#facts")).to_contain_text(f"{step} of 1000")
    rows = page.locator("#table tbody tr td:first-child")
    expect(rows.first).to_have_text(str(step))


def test_the_past_is_shown_and_new_steps_arrive(run: LiveRun, page: Page) -> None:
    expect_step(page, 3)
    expect(page.get_by_role("heading", level=1)).to_have_text("a-run")
    run.advance(2)
    expect_step(page, 5)
    expect_fact(page, "Time of a step", "1.5 s")
    expect_fact(page, "Time left", "25 min")
    expect_fact(page, "Weights version", "5")
    score = page.get_by_role("figure").filter(has_text="reward model, mean")
    expect(score.locator(".value")).to_contain_text("1.25")
    steps = page.locator("#table tbody tr td:first-child").all_text_contents()
    assert steps == ["5", "4", "3", "2", "1"]
    assert page.title() == "5/1000 running · a-run"


def test_the_run_is_steered(run: LiveRun, page: Page) -> None:
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#state")).to_have_text("paused")
    expect(page.get_by_role("status")).to_have_text("The run is paused, after step 3 of 1000.")
    run.advance(5)
    expect_step(page, 4)
    page.get_by_role("button", name="Checkpoint").click()
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("step 4 is on disk: /runs/a/checkpoints/step-000004")
    expect_fact(page, "Newest checkpoint", "step 4")
    assert run.step == 4
    page.get_by_role("button", name="Resume").click()
    expect_step(page, 8)
    page.get_by_role("button", name="Stop…").click()
    page.get_by_role("button", name="Keep it running").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert run.control.snapshot.state is RunState.RUNNING
    page.get_by_role("button", name="Stop…").click()
    page.get_by_role("button", name="Stop the run").click()
    expect(page.locator("#state")).to_have_text("stopping")
    run.advance()
    expect(page.locator("#state")).to_have_text("stopped")
    expect(notice).to_contain_text("stopped after step 9")
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()


def test_charts_are_read_with_the_keyboard(run: LiveRun, page: Page) -> None:
    chart = page.get_by_role("slider", name="KL from the reference, nats a response")
    chart.focus()
    page.keyboard.press("ArrowLeft")
    expect(chart).to_have_attribute("aria-valuetext", "step 2: 0.250")
    score = page.get_by_role("slider", name=re.compile("^Score"))
    expect(score).to_have_attribute("aria-valuetext", "step 2: 0.500")
    page.keyboard.press("Home")
    expect(chart).to_have_attribute("aria-valuenow", "1")
    page.keyboard.press("Escape")
    expect(chart).to_have_attribute("aria-valuenow", "3")


def test_samples_show_what_each_token_cost(run: LiveRun, page: Page) -> None:
    response = page.locator(".response")
    expect(response).to_have_text("3 plus 4 is 7")
    tokens = response.locator(".token")
    expect(tokens.nth(1)).to_have_attribute("title", "KL \u22120.250 nats, reward 0.0125")

    def colours() -> list[str]:
        return tokens.evaluate_all("them => them.map(it => it.style.backgroundColor)")

    by_kl = colours()
    page.get_by_text("Reward", exact=True).last.click()
    expect(page.get_by_role("radio", name="Reward")).to_be_checked()
    assert colours() != by_kl
    run.advance()
    expect(page.locator("#samples-step")).to_have_text("of step 4")


def test_a_trainer_that_comes_back_is_noticed(browser: Browser) -> None:
    """It was killed after step 6, and goes on from the checkpoint of step 4."""
    port = free_port()
    run, address = LiveRun(step=6), f"http://127.0.0.1:{port}/"
    with serving_run(run, http_port=port):
        window = open_page(browser, address)
        page = window.__enter__()
        expect_step(page, 6)
        page.evaluate("window.isTheSamePage = true")
        run.control._listeners.clear()
    run.end()
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("The trainer does not answer")
    expect(page.locator("#state")).to_have_text("not reached")
    expect(page.get_by_role("button", name="Pause")).to_be_disabled()
    again = LiveRun(step=4)
    with serving_run(again, http_port=port):
        expect(notice).to_contain_text("started again, and goes on after step 4")
        again.advance(3)
        expect_step(page, 7)
        steps = page.locator("#table tbody tr td:first-child").all_text_contents()
        assert steps == ["7", "6", "5", "4", "3", "2", "1"]
        assert page.evaluate("window.isTheSamePage")
        window.__exit__(None, None, None)
        again.end()


def test_the_end_of_a_run_is_told(browser: Browser) -> None:
    port = free_port()
    run = LiveRun(step=3, total_steps=4)
    with serving_run(run, http_port=port), open_page(browser, f"http://127.0.0.1:{port}/") as page:
        expect(page.locator("#state")).to_have_text("running")
        run.advance()
        expect(page.locator("#state")).to_have_text("complete")
        expect(page.get_by_role("alert")).to_contain_text("all 4 steps are done")


def test_a_failure_is_told(browser: Browser) -> None:
    port = free_port()
    run = LiveRun()
    with serving_run(run, http_port=port), open_page(browser, f"http://127.0.0.1:{port}/") as page:
        expect(page.locator("#state")).to_have_text("running")
        run.control.end(RunState.FAILED, "the reward service is gone <b>for good</b>.")
        expect(page.locator("#state")).to_have_text("failed")
        expect(page.get_by_role("alert")).to_contain_text("gone <b>for good</b>")


def test_a_token_is_asked_for_and_kept_in_the_tab_alone(
    browser: Browser, run: LiveRun, tmp_path: Path
) -> None:
    token, line = make_token("someone")
    (tmp_path / "keys").write_text(line + "\n")
    port = free_port()
    auth = {"mode": "token", "tokens_file": tmp_path / "keys"}
    with serving_run(run, http_port=port, auth=auth):
        with open_page(browser, f"http://127.0.0.1:{port}/") as page:
            expect(page.get_by_label("Token", exact=True)).to_be_focused()
            expect(page.locator("#run")).to_be_hidden()
            assert "a-run" not in page.content()
            page.get_by_label("Token", exact=True).fill("kleash-wrong")
            page.get_by_role("button", name="Show the run").click()
            expect(page.locator("#sign-in-text")).to_contain_text("The token was refused")
            expect(page.locator("#run")).to_be_hidden()
            page.get_by_label("Token", exact=True).fill(token)
            page.keyboard.press("Enter")
            expect_step(page, 3)
            page.get_by_role("button", name="Pause").click()
            expect(page.locator("#state")).to_have_text("paused")
            page.reload()
            expect(page.locator("#state")).to_have_text("paused")
            assert page.evaluate("localStorage.length") == 0
            assert page.context.cookies() == []
            assert token not in page.url
            page.get_by_role("button", name="Forget token").click()
            expect(page.get_by_label("Token", exact=True)).to_be_visible()
            expect(page.locator("#run")).to_be_hidden()
        run.end()


def test_nothing_is_asked_of_others(browser: Browser, run: LiveRun) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    with serving_run(run, http_port=port):
        with open_page(browser, "about:blank") as page:
            asked: list[str] = []
            complaints: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: complaints.append(message.text))
            page.goto(address)
            expect_step(page, 3)
            assert complaints == []
            assert [url for url in asked if not url.startswith((address, "data:"))] == []
        run.end()


def test_it_fits_a_small_screen(browser: Browser, run: LiveRun) -> None:
    port = free_port()
    with serving_run(run, http_port=port):
        with open_page(browser, f"http://127.0.0.1:{port}/", size=(360, 700)) as page:
            expect_step(page, 3)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
        run.end()

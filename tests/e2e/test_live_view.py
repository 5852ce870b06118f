"""A real run, watched and steered from its live page and from the terminal, across a restart."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.browser import open_page
from tests.e2e.conftest import Cluster

from kleash.ppo.config import PPOConfig
from kleash.rpc.static_tokens import make_token
from kleash.up.supervisor import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

KLEASH = [sys.executable, "-m", "kleash.cli"]
TOTAL_STEPS = 100_000
END_S = 60.0


def config_of(cluster: Cluster, out: Path, **server: Any) -> PPOConfig:
    """A run without end, with ports that stay."""
    ports = {"port": free_port(), "http_port": free_port()}
    return cluster.config(
        out,
        total_steps=TOTAL_STEPS,
        batch_size=4,
        checkpoint={"every": 5},
        server={**ports, **server},
    )


def wait_for_step(page: Page, step: int) -> None:
    page.wait_for_function(
        "step => parseInt(document.querySelector('#facts dd')?.textContent) >= step", arg=step
    )


def steps_in_table(page: Page) -> list[int]:
    """Newest first."""
    return [int(each) for each in page.locator("#table td:first-child").all_text_contents()]


def test_a_run_is_steered_from_its_page(cluster: Cluster, browser: Browser, tmp_path: Path) -> None:
    token, line = make_token("someone")
    (tmp_path / "keys").write_text(line + "\n")
    auth = {"mode": "token", "tokens_file": tmp_path / "keys"}
    config = config_of(cluster, tmp_path / "run", auth=auth)
    trainer = cluster.trainer(config)
    try:
        trainer.wait_for_steps(2)
        with open_page(browser, f"http://127.0.0.1:{config.server.http_port}/") as page:
            page.get_by_label("Token", exact=True).fill(token)
            page.get_by_role("button", name="Show the run").click()
            expect(page.locator("#state")).to_have_text("running")
            wait_for_step(page, len(Cluster.steps(config.out)) + 2)
            expect(page.locator(".token").first).to_be_attached()

            page.get_by_role("button", name="Pause").click()
            expect(page.locator("#state")).to_have_text("paused")
            # The step in progress ends; the checkpoint is written after it.
            page.get_by_role("button", name="Checkpoint").click()
            expect(page.get_by_role("alert")).to_contain_text("is on disk")
            paused_at = len(Cluster.steps(config.out))
            assert (config.out / "checkpoints" / f"step-{paused_at:06d}").is_dir()
            expect(page.locator("#facts")).to_contain_text(f"step {paused_at}")
            wait_for_step(page, paused_at)

            page.get_by_role("button", name="Resume").click()
            wait_for_step(page, paused_at + 2)
            page.get_by_role("button", name="Stop…").click()
            page.get_by_role("button", name="Stop the run").click()
            expect(page.locator("#state")).to_have_text("stopped")
            assert trainer.process.wait(END_S) == 0
        steps = [row["step"] for row in Cluster.steps(config.out)]
        assert steps == list(range(1, len(steps) + 1))
        assert (config.out / "checkpoints" / f"step-{len(steps):06d}").is_dir()
    finally:
        trainer.process.kill()
        trainer.process.wait()


def test_a_killed_trainer_is_followed_on(
    cluster: Cluster, browser: Browser, tmp_path: Path
) -> None:
    """By the page and by the terminal, which see each step of the run, and none twice."""
    config = config_of(cluster, tmp_path / "run")
    trainer = cluster.trainer(config)
    watch = None
    try:
        trainer.wait_for_steps(7)
        watch = subprocess.Popen(
            [*KLEASH, "watch", str(config.out), "--from_step=1"], stdout=subprocess.PIPE, text=True
        )
        assert watch.stdout is not None
        lines = [watch.stdout.readline() for _ in range(8)]
        with open_page(browser, f"http://127.0.0.1:{config.server.http_port}/") as page:
            wait_for_step(page, 7)
            assert trainer.end(signal.SIGKILL) == -signal.SIGKILL
            expect(page.locator("#state")).to_have_text("not reached")
            trainer = cluster.trainer(config, "--resume=true")
            expect(page.locator("#state")).to_have_text("running")
            wait_for_step(page, 12)
            shown = steps_in_table(page)
            assert shown == list(range(shown[0], max(shown[0] - 20, 0), -1))
            stop = subprocess.run(
                [*KLEASH, "trainer", "stop", str(config.out)],
                capture_output=True,
                text=True,
                check=True,
                timeout=END_S,
            )
            assert stop.stdout.startswith("stopping after step ")
            expect(page.locator("#state")).to_have_text("stopped")
            assert trainer.process.wait(END_S) == 0
        lines += watch.communicate(timeout=END_S)[0].splitlines(keepends=True)
        assert watch.returncode == 0
    finally:
        trainer.process.kill()
        trainer.process.wait()
        if watch is not None:
            watch.kill()
            watch.communicate()
    told = "".join(lines)
    last = len(Cluster.steps(config.out))
    assert "the trainer does not answer, and is asked again" in told
    assert "the trainer answers again" in told
    assert f"stopped after step {last} of {TOTAL_STEPS}" in told
    seen = [int(each.split("/")[0].split()[1]) for each in lines if each.startswith("step ")]
    assert seen[-1] == last
    # Where the trainer went on from an earlier checkpoint, steps are told again from there on.
    again = [at for at in range(1, len(seen)) if seen[at] != seen[at - 1] + 1]
    assert len(again) <= 1
    assert all(seen[at] <= seen[at - 1] for at in again)
    assert ("started again" in told) == bool(again)

"""Every expression of every dashboard, asked of a Prometheus that reads a real run."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from k8s.dashboards.draw import WIDTH_PX, height_px
from k8s.dashboards.saved import NAMES, dashboard, expressions, fill_in
from PIL import Image
from tests.k8s.tools import ROOT, need
from tests.observed_run import NAMESPACE, Models, ObservedRun, observed_run
from tests.prometheus import START_S
from tests.reward_callers import LIMITS, RewardCallers

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

EMPTY = {
    ("reward-slo", "Memory of GPUs"): "this machine's processes compute on the CPU",
    ("services", "Memory of GPUs"): "this machine's processes compute on the CPU",
}
"""Panels that show nothing here, and why. One that shows something must leave this table."""


@pytest.fixture(scope="module")
def run(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ObservedRun]:
    """A run with callers beside it, in which two services were away for a moment."""
    program = need("prometheus")
    models = Models(policy=tiny_folder, reward=tiny_reward_folder)
    folder = tmp_path_factory.mktemp("observed")
    with observed_run(folder, program, models, reward={"limits": LIMITS}) as run:
        run.train()
        with RewardCallers(run.pod("reward").address):
            run.wait_for_steps(2)
            away = run.pod("reference"), run.pod("policy", 1)
            for pod in away:
                pod.kill()
            for pod in away:
                pod.start()
            run.wait_for_steps(len(run.steps()) + 5)
            run.prometheus.wait_for_targets()
            yield run


def asked(run: ObservedRun, expression: str) -> bool:
    """Whether the expression has a number, in any series."""
    interval_s = 8 * run.prometheus.interval_s
    filled = fill_in(expression, rate_interval_s=interval_s, namespace=NAMESPACE)
    result = run.prometheus.query(filled)
    return any(math.isfinite(float(series["value"][1])) for series in result)


@pytest.mark.parametrize("name", NAMES)
def test_every_expression_has_an_answer(name: str, run: ObservedRun) -> None:
    waiting = {
        (title, expression)
        for title, expression in expressions(dashboard(name))
        if (name, title) not in EMPTY
    }
    assert len(waiting) > 15
    # Some callers err only every few seconds, and a rate needs two scrapes with the error.
    deadline = time.monotonic() + 2 * START_S
    while waiting and time.monotonic() < deadline:
        waiting = {(title, each) for title, each in waiting if not asked(run, each)}
        time.sleep(run.prometheus.interval_s)
    assert not waiting, f"{len(waiting)} expressions of {name} have no answer"


def test_what_is_excused_is_empty(run: ObservedRun) -> None:
    excused = {
        (name, title): expression
        for name in NAMES
        for title, expression in expressions(dashboard(name))
        if (name, title) in EMPTY
    }
    assert excused.keys() == EMPTY.keys(), "EMPTY names a panel that no dashboard has"
    shown = [panel for panel, expression in excused.items() if asked(run, expression)]
    assert not shown, "take these out of EMPTY: they show something"


def test_pictures_have_data_in_every_panel(run: ObservedRun, tmp_path: Path) -> None:
    """The command; the tests above have waited for an answer to every expression."""
    command = [sys.executable, "-m", "k8s.dashboards.draw", run.prometheus.url, NAMESPACE, tmp_path]
    times = ["--minutes=2", f"--scrape-interval={run.prometheus.interval_s}"]
    done = subprocess.run([*command, *times], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, line in zip(NAMES, done.stdout.splitlines(), strict=True):
        path = tmp_path / f"dashboard-{name}.png"
        empty = ", ".join(title for dashboard_name, title in EMPTY if dashboard_name == name)
        size = f"{path.stat().st_size / 1000:.0f} kB"
        assert line == f"{path}: {size}" + (f", no data in: {empty}" if empty else "")
        with Image.open(path) as image:
            assert image.size == (WIDTH_PX, height_px(dashboard(name)))
        assert path.stat().st_size < 400_000


def test_an_expression_without_series_is_seen(run: ObservedRun) -> None:
    """Prometheus answers it without an error: the tests above must not take that for an answer."""
    assert asked(run, 'kleash_model_loaded{namespace="$namespace"}')
    assert not asked(run, 'kleash_model_loadedd{namespace="$namespace"}')
    assert not asked(run, "vector(0) / 0"), "not a number"

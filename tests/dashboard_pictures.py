"""Draws the dashboards for docs/: `make dashboard-pictures`. Takes MINUTES and a little more.

    python -m tests.dashboard_pictures docs/images --minutes=4

Every number in them is one that a Prometheus read from a real run on tiny models, with applications
that call its reward service, and a replica of the policy that is killed and started again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from k8s.dashboards.answers import Asking
from k8s.dashboards.draw import described, draw_all
from tests.k8s.tools import find
from tests.observed_run import NAMESPACE, ObservedRun, observed_run, tiny_models
from tests.reward_callers import LIMITS, RewardCallers


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from a run made for it.")
    parser.add_argument("folder", type=Path, help="for the pictures")
    parser.add_argument("--minutes", type=float, default=4, help="of the run (default: 4)")
    options = parser.parse_args()
    program = find("prometheus")
    if program is None:
        sys.stderr.write("prometheus is neither on PATH nor in build/tools: run make k8s-tools\n")
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with observed_run(folder, program, tiny_models(folder), reward={"limits": LIMITS}) as run:
            drawn = _pictures(run, options.folder, 60 * options.minutes)
    sys.stdout.write(described(drawn))
    return 0


def _pictures(run: ObservedRun, folder: Path, seconds: float) -> dict[Path, list[str]]:
    began = time.time()
    # One replica is enough: the other one's restart shows as a lag and does not stop the run.
    run.train(total_steps=2000, publish={"quorum": 1}, kl={"target": 4.0})
    run.wait_for_steps(1)
    with RewardCallers(run.pod("reward").address):
        time.sleep(seconds * 0.6)
        replica = run.pod("policy", 1)
        replica.kill()
        replica.start()
        time.sleep(max(0.0, began + seconds - time.time()))
        asking = Asking(
            run.prometheus,
            namespace=NAMESPACE,
            start_s=began,
            end_s=time.time(),
            scrape_interval_s=run.prometheus.interval_s,
        )
        return draw_all(asking, folder)


if __name__ == "__main__":
    sys.exit(main())

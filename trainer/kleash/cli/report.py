"""``kleash report``: one HTML file from the folders of one or more PPO runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kleash.base.errors import ConfigError
from kleash.cli.flags import Parser, parse_or_help
from kleash.cli.output import show

MOST_SAMPLES = 1000


def run(arguments: Sequence[str]) -> int:
    """Read the runs and write the page."""
    flags = parse_or_help(_parser(), arguments)
    if flags is None:
        return 0
    if not 0 <= flags.samples <= MOST_SAMPLES:
        raise ConfigError(f"--samples={flags.samples} is not between 0 and {MOST_SAMPLES}.")
    from kleash.evaluate.run_data import read_runs
    from kleash.evaluate.run_report import render_run_report

    runs = read_runs(flags.runs)
    out = flags.out or (runs[0].path / "run-report.html" if len(runs) == 1 else Path("report.html"))
    title = flags.title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")
    render_run_report(runs, out, title=title, num_samples=flags.samples)
    show(f"report: {out}, {out.stat().st_size / 1000:.0f} kB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kleash report",
        description=(
            "One HTML file that needs no network: curves with bands over seeds, comparison, "
            "reward-hacking watch, samples with coloured tokens, versions and origins. Also of "
            "runs that live or have crashed. Runs that differ only in their seed are one group."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="--out folder of a PPO run")
    help_ = "RUN/run-report.html without it, of several runs report.html"
    add("--out", metavar="FILE", type=Path, help=help_)
    add("--title", metavar="TEXT", default="", help="the run's name without it")
    add("--samples", metavar="N", type=int, default=24, help="of each run; 24 without it")
    return parser

"""``kleash demo``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kleash.cli.output import show

if TYPE_CHECKING:
    from kleash.demo.config import DemoConfig


def run(arguments: Sequence[str]) -> int:
    """Run the demo and say where the report is."""
    from kleash.cli.options import limit_threads, parse
    from kleash.demo.config import DemoConfig

    config = parse(DemoConfig, arguments, usage="kleash demo [CONFIG.toml] [--key=value ...]")
    if config is None:
        return 0
    from kleash.base.logging import configure_logging
    from kleash.cli.progress import TerminalProgress
    from kleash.demo.pipeline import Demo

    configure_logging()
    limit_threads(config.num_threads)
    progress = TerminalProgress()
    try:
        report = Demo(config, progress).run()
    finally:
        progress.finish()
    show(_places(config) if report is None else _outcome(report, config.out))
    return 0


def _places(config: DemoConfig) -> str:
    """Of what the stages up to ``config.until`` made."""
    from kleash.demo.folder import RESULTS

    assert config.until is not None
    lines = [f"demo: complete up to {config.until}"]
    width = max(map(len, RESULTS))
    for name, result in RESULTS.items():
        lines.append(f"  {name:<{width}}  {config.out / result}")
        if name == config.until:
            break
    return "\n".join(lines)


def _outcome(report: dict, out: object) -> str:
    gold, win = report["gold"], report["win_rate"]["ppo_vs_sft"]
    return (
        f"gold score: base {gold['base']['total']:.3f}, SFT {gold['sft']['total']:.3f}, "
        f"PPO {gold['ppo']['total']:.3f}\n"
        f"PPO beats SFT on {win['rate']:.1%} of {win['n']} held-out prompts "
        f"(95 % interval {win['ci95'][0]:.1%} to {win['ci95'][1]:.1%}), "
        f"in {report['wall_seconds']['total']:.0f} s\n"
        f"report: {out}/report.html"
    )

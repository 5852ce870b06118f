"""``kleash trace``: where the time of a PPO step went."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kleash.base.errors import ConfigError
from kleash.cli.flags import Parser, parse_or_help
from kleash.cli.output import show

if TYPE_CHECKING:
    from kleash.traces.read import StepTrace

MOST_PATH_PARTS = 8
VIEWER = "https://ui.perfetto.dev"


def run(arguments: Sequence[str]) -> int:
    """Read the spans, write the timeline, print the sums."""
    flags = parse_or_help(_parser(), arguments)
    if flags is None:
        return 0
    from kleash.traces.chrome import chrome_trace
    from kleash.traces.read import files_of_run, read_spans, step_traces

    traces = step_traces(read_spans(files_of_run(flags.run, flags.spans)))
    trace = _chosen(traces, flags.step)
    out = flags.out or flags.run / "traces" / f"step-{trace.step:06d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(chrome_trace(trace)) + "\n", encoding="utf-8")
    lines = [*describe(trace), "", f"timeline: {out}, to be opened at {VIEWER}"]
    if flags.picture is not None:
        from kleash.traces.picture import draw

        draw(trace, flags.picture)
        lines.append(f"picture: {flags.picture}")
    show("\n".join(lines))
    return 0


def describe(trace: StepTrace) -> list[str]:
    """The table, as lines."""
    from kleash.traces.summary import critical_path, phases

    num_processes = len({span.process for span in trace.spans})
    plural = "" if num_processes == 1 else "es"
    lines = [
        f"step {trace.step}: {trace.seconds:.3f} s, {len(trace.spans)} spans of "
        f"{num_processes} process{plural}",
        "",
        f"{'phase':<26}{'seconds':>9}{'of step':>9}  {'while generating':>16}",
    ]
    for phase in phases(trace):
        hidden = "" if phase.hidden is None else f"{phase.hidden:.0%}"
        share = phase.seconds / trace.seconds
        lines.append(f"{phase.name:<26}{phase.seconds:>9.3f}{share:>9.0%}  {hidden:>16}".rstrip())
    lines += ["", f"{'critical path':<26}{'seconds':>9}{'of step':>9}"]
    parts = critical_path(trace)
    for part in parts[:MOST_PATH_PARTS]:
        label, share = f"{part.process} {part.name}", part.seconds / trace.seconds
        lines.append(f"{label:<26}{part.seconds:>9.3f}{share:>9.0%}")
    if rest := sum(part.seconds for part in parts[MOST_PATH_PARTS:]):
        lines.append(f"{'everything else':<26}{rest:>9.3f}{rest / trace.seconds:>9.0%}")
    return lines


def _chosen(traces: dict[int, StepTrace], step: int | None) -> StepTrace:
    if not traces:
        raise ConfigError("the files hold no step that has ended; wait for one, or read others.")
    if step is None:
        return traces[max(traces)]
    if step not in traces:
        raise ConfigError(
            f"step {step} was not traced; these were: {', '.join(map(str, sorted(traces)))}."
        )
    return traces[step]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kleash trace",
        description=(
            "Where the time of a PPO step went, from the spans of the trainer and the services: "
            "sums, and a timeline of all processes for Perfetto. Runs record spans with "
            "--tracing.exporter=file; docs/tracing.md explains them."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="--out folder of a PPO run")
    add("--step", metavar="N", type=int, help="the last one that was traced without it")
    help_ = "the timeline; RUN/traces/step-N.json without it"
    add("--out", metavar="FILE", type=Path, help=help_)
    help_ = "files of services that did not write into RUN/traces, one or more"
    add("--spans", metavar="FILE", nargs="+", type=Path, default=[], help=help_)
    add("--picture", metavar="FILE", type=Path, help="draw the timeline, too: .png, .svg or .pdf")
    return parser

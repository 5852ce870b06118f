"""What is read out of spans: steps, tracks without overlaps, Perfetto's format, sums."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.base.errors import ConfigError, DataError
from kleash.cli.trace import run
from kleash.traces.chrome import chrome_trace
from kleash.traces.read import (
    CLIENT,
    INTERNAL,
    SERVER,
    Process,
    RecordedSpan,
    StepTrace,
    files_of_run,
    read_spans,
    step_traces,
)
from kleash.traces.summary import common, critical_path, phases, total_s, union
from kleash.traces.tracks import tracks_of

pytestmark = pytest.mark.unit

TRAINER = Process("kleash-trainer", "a", "pid 1 on host")
POLICY = Process("kleash-policy", "b", "pid 2 on host")
REWARD = Process("kleash-reward", "c", "pid 3 on host")
EPOCH_NS = 1_795_000_000_000_000_000
MS = 1_000_000


class Trace:
    """A trace that is written down span by span, in milliseconds since its step began."""

    def __init__(self) -> None:
        self.spans: list[RecordedSpan] = []

    def add(
        self,
        name: str,
        start_ms: float,
        end_ms: float,
        parent: RecordedSpan | None = None,
        *,
        process: Process = TRAINER,
        kind: int = INTERNAL,
        links: tuple[RecordedSpan, ...] = (),
        **attributes: Any,
    ) -> RecordedSpan:
        span = RecordedSpan(
            trace_id="t" * 32,
            span_id=f"{len(self.spans):016x}",
            parent_id=parent.span_id if parent else "",
            name=name,
            kind=kind,
            start_ns=EPOCH_NS + int(start_ms * MS),
            end_ns=EPOCH_NS + int(end_ms * MS),
            attributes={f"kleash.{key}": value for key, value in attributes.items()},
            links=tuple(link.span_id for link in links),
            has_failed=False,
            process=process,
        )
        self.spans.append(span)
        return span

    def of_step(self, step: int) -> StepTrace:
        return step_traces(self.spans)[step]


def small_step() -> StepTrace:
    """100 ms: generation for 50, with a score that ends 10 ms after it and two references inside;
    an update and a publish."""
    trace = Trace()
    root = trace.add("ppo_step", 0, 100, step=7)
    rollout = trace.add("rollout", 0, 60, root)
    generate = trace.add("generate", 0, 50, rollout)
    call = trace.add("kleash.policy.v1.PolicyService/Generate", 1, 49, generate, kind=CLIENT)
    name = call.name
    served = trace.add(name, 2, 48, call, process=POLICY, kind=SERVER)
    trace.add("decode", 4, 48, served, process=POLICY)
    trace.add("score", 40, 60, rollout)
    trace.add("reference", 10, 20, rollout)
    trace.add("reference", 15, 30, rollout)
    trace.add("update", 60, 85, root)
    trace.add("publish", 85, 100, root)
    return trace.of_step(7)


# ----------------------------------------------------------------------------------------- reading


def line(**span: Any) -> str:
    described = {
        "traceId": "a" * 32,
        "spanId": "b" * 16,
        "name": "ppo_step",
        "startTimeUnixNano": "1000",
        "endTimeUnixNano": "2000",
        "attributes": [{"key": "kleash.step", "value": {"intValue": "3"}}],
        **span,
    }
    scopes = [{"spans": [described]}]
    return json.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": scopes}]}) + "\n"


def test_lines_of_other_writers_of_otlp_are_read(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    values = [
        {"key": "a", "value": {"stringValue": "x"}},
        {"key": "b", "value": {"arrayValue": {"values": [{"doubleValue": 0.5}]}}},
        {"key": "c", "value": {"boolValue": True}},
    ]
    path.write_text(line(attributes=values, status={"code": 2}, links=[{"spanId": "c" * 16}]))
    (span,) = read_spans([path])
    assert span.attributes == {"a": "x", "b": [0.5], "c": True}
    assert span.has_failed
    assert span.links == ("c" * 16,)
    assert (span.parent_id, span.kind, span.process.name) == ("", INTERNAL, "unknown")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    path.write_text(line() + line()[:40])
    assert len(read_spans([path])) == 1


def test_a_line_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    path.write_text(line() + '{"step": 1}\n')
    with pytest.raises(DataError, match=r"spans\.jsonl:2: this is no line of spans"):
        read_spans([path])


def test_of_a_step_that_was_done_again_the_last_trace_counts(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    later = line(traceId="d" * 32, startTimeUnixNano="5000", endTimeUnixNano="9000")
    child = line(traceId="e" * 32, parentSpanId="f" * 16)
    path.write_text(later + line() + child)
    traces = step_traces(read_spans([path]))
    assert list(traces) == [3]
    assert traces[3].root.trace_id == "d" * 32


def test_a_run_without_spans_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tracing\.exporter=file"):
        files_of_run(tmp_path)
    with pytest.raises(ConfigError, match="there is no file"):
        files_of_run(tmp_path, [tmp_path / "none.jsonl"])


# ------------------------------------------------------------------------------------------ tracks


@st.composite
def step_spans(draw: st.DrawFn) -> StepTrace:
    """Trees of spans whose children mostly lie in their parents, in up to three processes."""
    trace = Trace()
    parents = [trace.add("ppo_step", 0, 1000, step=1)]
    for _ in range(draw(st.integers(0, 25))):
        parent = draw(st.sampled_from(parents))
        low, high = parent.start_ns - EPOCH_NS, parent.end_ns - EPOCH_NS
        begin = draw(st.integers(low, high))
        end = draw(st.integers(begin, high + draw(st.sampled_from([0, 0, 0, 5 * MS]))))
        parents.append(
            trace.add(
                draw(st.sampled_from(["score", "generate", "a.B/Call"])),
                begin / MS,
                end / MS,
                parent,
                process=draw(st.sampled_from([parent.process, TRAINER, POLICY, REWARD])),
                kind=draw(st.sampled_from([INTERNAL, SERVER, CLIENT])),
            )
        )
    return trace.of_step(1)


@given(step_spans())
def test_nothing_on_a_track_overlaps(trace: StepTrace) -> None:
    tracks = [track for of_process in tracks_of(trace).values() for track in of_process]
    placed = [span for track in tracks for span in track.spans]
    assert sorted(it.span_id for it in placed) == sorted(it.span_id for it in trace.spans)
    for track in tracks:
        assert len({span.process for span in track.spans}) == 1
        open_spans: list[RecordedSpan] = []
        for span in track.spans:
            while open_spans and open_spans[-1].end_ns <= span.start_ns:
                open_spans.pop()
            if open_spans:
                assert span.end_ns <= open_spans[-1].end_ns, "a span sticks out of the one below"
                assert span.parent_id == open_spans[-1].span_id, "a stranger lies in a span"
            open_spans.append(span)
    for of_process in tracks_of(trace).values():
        names = [track.name for track in of_process]
        assert len(set(names)) == len(names)


def test_what_runs_side_by_side_gets_tracks_of_its_name() -> None:
    tracks = tracks_of(small_step())
    assert [track.name for track in tracks[TRAINER]] == [
        "ppo_step",
        "generate",
        "reference",
        "reference 2",
        "score",
    ]
    (calls,) = tracks[POLICY]
    assert (calls.name, [span.short_name for span in calls.spans]) == (
        "calls",
        ["Generate", "decode"],
    )
    assert [span.name for span in tracks[TRAINER][0].spans] == [
        "ppo_step",
        "rollout",
        "update",
        "publish",
    ]


# ------------------------------------------------------------------------------------ the timeline


@given(step_spans())
def test_the_timeline_is_valid(trace: StepTrace) -> None:
    described = json.loads(json.dumps(chrome_trace(trace)))
    events = described["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(trace.spans)
    named = {(it["pid"], it["tid"]) for it in events if it["name"] == "thread_name"}
    for event in complete:
        assert event["dur"] >= 0
        assert isinstance(event["ts"], int)
        assert (event["pid"], event["tid"]) in named
    for place in named:
        on_track = [it for it in complete if (it["pid"], it["tid"]) == place]
        ends: list[int] = []
        for event in on_track:
            end = event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"] and (end > ends[-1] or event["dur"] > 0):
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)
        assert all(a["ts"] <= b["ts"] for a, b in pairwise(on_track))
    begun = {it["id"]: it for it in events if it["ph"] == "s"}
    ended = {it["id"]: it for it in events if it["ph"] == "f"}
    assert begun.keys() == ended.keys()


def test_calls_and_batches_have_arrows() -> None:
    trace = Trace()
    root = trace.add("ppo_step", 0, 100, step=1)
    calls = [trace.add("a.Reward/Score", 10 + n, 60, root, kind=CLIENT) for n in (0, 1)]
    served = [
        trace.add("a.Reward/Score", 15, 55, call, process=REWARD, kind=SERVER) for call in calls
    ]
    trace.add("compute", 20, 50, served[0], process=REWARD, links=tuple(served))
    events = chrome_trace(trace.of_step(1))["traceEvents"]
    assert [it["name"] for it in events if it["ph"] == "s"] == ["call", "call", "batch"]
    bars = [it for it in events if it["ph"] == "X"]
    for arrow in (it for it in events if it["ph"] in "sf"):
        at = (arrow["pid"], arrow["tid"])
        assert any(
            (it["pid"], it["tid"]) == at and it["ts"] <= arrow["ts"] <= it["ts"] + it["dur"]
            for it in bars
        ), "an arrow that hits no bar"
    processes = {it["args"]["name"] for it in events if it["name"] == "process_name"}
    assert processes == {"trainer (pid 1 on host)", "reward (pid 3 on host)"}


# -------------------------------------------------------------------------------------------- sums


def test_phases_and_what_generation_hides() -> None:
    found = {phase.name: phase for phase in phases(small_step())}
    assert {name: phase.seconds for name, phase in found.items()} == pytest.approx(
        {"generate": 0.050, "score": 0.020, "reference": 0.020, "update": 0.025, "publish": 0.015}
    )
    assert found["score"].hidden == pytest.approx(0.5)
    assert found["reference"].hidden == pytest.approx(1.0)
    assert found["update"].hidden is None
    assert found["reference"].num_spans == 2


def test_what_an_evaluation_generates_is_the_evaluations() -> None:
    trace = Trace()
    root = trace.add("ppo_step", 0, 100, step=1)
    evaluation = trace.add("evaluation", 0, 40, root)
    rollout = trace.add("rollout", 0, 40, evaluation)
    trace.add("generate", 0, 40, rollout)
    assert [phase.name for phase in phases(trace.of_step(1))] == ["evaluation"]


def test_the_critical_path() -> None:
    """Back from the end: publish 15, update 25, the score from 40 on 20, generation before it."""
    parts = {(part.process, part.name): part.seconds for part in critical_path(small_step())}
    assert parts == pytest.approx(
        {
            ("trainer", "publish"): 0.015,
            ("trainer", "update"): 0.025,
            ("trainer", "score"): 0.020,
            ("policy", "decode"): 0.036,
            ("policy", "Generate"): 0.002,
            ("trainer", "Generate"): 0.001,
            ("trainer", "generate"): 0.001,
        }
    )


@given(step_spans())
def test_the_critical_path_adds_up_to_the_step(trace: StepTrace) -> None:
    assert sum(part.seconds for part in critical_path(trace)) == pytest.approx(trace.seconds)


INTERVALS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8)


@given(INTERVALS, INTERVALS)
def test_unions_and_their_common_time(
    left: list[tuple[int, int]], right: list[tuple[int, int]]
) -> None:
    """Against counting the nanoseconds one by one."""

    def covered(pairs: list[tuple[int, int]]) -> set[int]:
        return {at for start, length in pairs for at in range(start, start + length)}

    a = union([(start, start + length) for start, length in left])
    b = union([(start, start + length) for start, length in right])
    assert total_s(a) == pytest.approx(len(covered(left)) / 1e9)
    assert total_s(common(a, b)) == pytest.approx(len(covered(left) & covered(right)) / 1e9)


# ----------------------------------------------------------------------------------------- command


def test_the_command_writes_the_timeline_and_prints_the_sums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "trainer.jsonl").write_text(line(endTimeUnixNano="2000001000"))
    elsewhere = tmp_path / "reward.jsonl"
    elsewhere.write_text(line(spanId="c" * 16, parentSpanId="b" * 16, name="a.B/Score", kind=2))
    assert run([str(tmp_path), "--spans", str(elsewhere)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 3: 2.000 s, 2 spans of 1 process\n")
    timeline = json.loads((tmp_path / "traces" / "step-000003.json").read_text())
    assert len([it for it in timeline["traceEvents"] if it["ph"] == "X"]) == 2
    with pytest.raises(ConfigError, match="step 4 was not traced; these were: 3"):
        run([str(tmp_path), "--step=4"])


def test_the_picture_has_a_row_a_track(tmp_path: Path) -> None:
    from kleash.traces.picture import COLOURS, draw, phase_of

    trace = small_step()
    draw(trace, tmp_path / "step.svg")
    assert "<svg" in (tmp_path / "step.svg").read_text()
    decode = next(span for span in trace.spans if span.name == "decode")
    assert phase_of(decode, trace) == "generate"
    assert phase_of(trace.root, trace) == ""
    assert len(set(COLOURS.values())) == len(COLOURS)

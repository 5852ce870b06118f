"""Tracing: off it is nothing; on, spans nest, cross threads and processes, and tell no text."""

from __future__ import annotations

import http.server
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.tracing import recorded

from kleash.base import tracing
from kleash.base.config import parse_tree
from kleash.base.errors import ConfigError
from kleash.base.logging import configure_logging
from kleash.base.trace_setup import (
    ServiceTracingConfig,
    TracingConfig,
    TrainerTracingConfig,
    set_up,
    traced,
)

pytestmark = pytest.mark.unit

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-2] + "00"
HEX = set("0123456789abcdef")


def trainer(folder: Path, **keys: Any) -> TrainerTracingConfig:
    return TrainerTracingConfig(exporter="file", file=folder / "spans.jsonl", **keys)


# ------------------------------------------------------------------------------------------- off


def test_a_process_that_does_not_trace_never_imports_opentelemetry() -> None:
    code = """
import sys
import kleash.client, kleash.rpc.server, kleash.rpc.work, kleash.policy.servicer
import kleash.ppo.train, kleash.up.config, kleash.cli.trace
from kleash.base import tracing
from kleash.base.trace_setup import TracingConfig, traced
step = dict(is_sampled=True, step=1)
with traced(TracingConfig(), "test"), tracing.root_span("ppo_step", **step) as span:
    span.note(x=1)
    assert tracing.inject() == () and tracing.extract([("traceparent", "x")]) is None
    assert tracing.current() is None and tracing.current_trace_id() is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_bound_functions_are_the_functions_themselves_while_off() -> None:
    assert tracing.bound(len) is len


def test_the_packages_are_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in list(sys.modules):
        if name.startswith(("opentelemetry", "kleash.base.trace_recorder")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"pip install 'kleash\[trace\]'"):
        set_up(trainer(tmp_path), "trainer")
    assert not tracing.is_on()


# ---------------------------------------------------------------------------------------- nesting


def test_spans_nest_and_carry_their_attributes(tmp_path: Path) -> None:
    with (
        recorded(tmp_path, service="reward") as its,
        tracing.span("outer", items=3) as outer,
    ):
        with tracing.span("inner"):
            assert tracing.current() is not None
        outer.note(share=0.5, is_big=True, kind="x", **{"rpc.system": "grpc"})
    outer_span, inner = its.one("outer"), its.one("inner")
    assert inner.parent_id == outer_span.span_id
    assert outer_span.parent_id == ""
    assert outer_span.attributes == {
        "kleash.items": 3,
        "rpc.system": "grpc",
        "kleash.share": 0.5,
        "kleash.is_big": True,
        "kleash.kind": "x",
    }
    assert outer_span.start_ns <= inner.start_ns <= inner.end_ns <= outer_span.end_ns
    assert outer_span.process.name == "reward"


def test_a_failure_is_told_by_its_type_and_never_by_its_words(tmp_path: Path) -> None:
    with recorded(tmp_path) as its:
        with pytest.raises(ValueError, match="secret"), tracing.span("works"):
            raise ValueError("the prompt was: secret")
        with tracing.span("goes on"):
            pass
    assert its.one("works").has_failed
    assert its.one("works").attributes == {"error.type": "ValueError"}
    assert not its.one("goes on").has_failed
    assert "secret" not in its.text


def test_work_in_another_thread_is_a_child_of_who_asked_for_it(tmp_path: Path) -> None:
    def work() -> None:
        with tracing.span("work"):
            pass

    with recorded(tmp_path) as its, ThreadPoolExecutor(1) as threads, tracing.span("asks"):
        threads.submit(tracing.bound(work)).result()
        threads.submit(work).result()
    bound, unbound = its.named("work")
    assert bound.parent_id == its.one("asks").span_id
    assert unbound.parent_id == ""


def test_work_that_was_measured_elsewhere_is_recorded_with_its_times(tmp_path: Path) -> None:
    with recorded(tmp_path) as its:
        with tracing.span("call") as call:
            start = tracing.now_ns()
            parent = tracing.current()
        tracing.record_span("queue", start, start + 5_000_000, parent=parent, links=[call], items=2)
        tracing.record_span("clock went back", start, start - 1, parent=parent)
        tracing.record_span("nobody's", start, start + 1, parent=None)
    queue = its.one("queue")
    assert queue.end_ns - queue.start_ns == 5_000_000
    assert queue.parent_id == its.one("call").span_id
    assert queue.links == (its.one("call").span_id,)
    back = its.one("clock went back")
    assert back.end_ns == back.start_ns
    assert its.named("nobody's") == []


def test_a_decorated_function_is_a_span(tmp_path: Path) -> None:
    @tracing.measured("encode")
    def encode(x: int, *, y: int) -> int:
        """Adds."""
        return x + y

    with recorded(tmp_path) as its, tracing.span("publish"):
        assert encode(1, y=2) == 3
    assert its.one("encode").parent_id == its.one("publish").span_id
    assert encode.__doc__ == "Adds."


# --------------------------------------------------------------------------------- across processes


def test_the_context_of_a_caller_is_taken_and_handed_on(tmp_path: Path) -> None:
    with recorded(tmp_path) as its:
        caller = tracing.extract([("user-agent", "x"), ("traceparent", CALLER)])
        with tracing.span("serves", kind="server", parent=caller):
            (name, told), *_ = tracing.inject()
            assert tracing.current_trace_id() == CALLER[3:35]
    span = its.one("serves")
    assert span.trace_id == CALLER[3:35]
    assert span.parent_id == CALLER[36:52]
    assert (name, told.split("-")[1:3]) == ("traceparent", [span.trace_id, span.span_id])


def test_the_state_of_a_callers_trace_is_handed_on(tmp_path: Path) -> None:
    with recorded(tmp_path):
        caller = tracing.extract([("traceparent", CALLER), ("tracestate", "vendor=1")])
        with tracing.span("serves", parent=caller):
            assert ("tracestate", "vendor=1") in tracing.inject()


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_context_that_is_none_begins_a_trace(tmp_path: Path, header: str) -> None:
    with recorded(tmp_path) as its:
        caller = tracing.extract([("traceparent", header)])
        assert caller is None
        with tracing.span("serves", parent=caller):
            pass
    assert set(its.one("serves").trace_id) <= HEX


def test_what_a_caller_does_not_record_is_not_recorded_here(tmp_path: Path) -> None:
    with recorded(tmp_path) as its:
        caller = tracing.extract([("traceparent", UNSAMPLED)])
        with tracing.span("serves", parent=caller):
            assert tracing.current() is None
            assert tracing.current_trace_id() is None
            (_, told), *_ = tracing.inject()
            assert told.split("-")[1] == UNSAMPLED[3:35]
            assert told.endswith("-00")
    assert its.spans == []


def test_calls_without_a_trace_are_traced_at_the_ratio_that_is_asked_for(tmp_path: Path) -> None:
    config = ServiceTracingConfig(exporter="file", file=tmp_path / "spans.jsonl", sample_ratio=0.0)
    with recorded(tmp_path, config) as its:
        with tracing.span("of nobody"):
            pass
        with tracing.span("of a caller", parent=tracing.extract([("traceparent", CALLER)])):
            pass
    assert [span.name for span in its.spans] == ["of a caller"]


def test_an_applications_own_trace_goes_on_in_our_calls() -> None:
    """Its OpenTelemetry, set up by itself; Kleash does not trace."""
    from opentelemetry import context, propagate, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    assert propagate is not None
    assert tracing.inject() == ()
    known = TraceContextTextMapPropagator().extract({"traceparent": CALLER})
    token = context.attach(known)
    try:
        assert trace.get_current_span().get_span_context().is_valid
        assert ("traceparent", CALLER) in tracing.inject()
    finally:
        context.detach(token)


# --------------------------------------------------------------------------------------- the steps


def test_a_trainer_records_its_chosen_steps_and_nothing_beside_them(tmp_path: Path) -> None:
    with recorded(tmp_path, trainer(tmp_path)) as its:
        with tracing.span("start-up"):
            pass
        for step in (1, 2):
            with tracing.root_span("ppo_step", is_sampled=step == 2, step=step):
                with tracing.span("update"):
                    pass
                (_, told), *_ = tracing.inject()
                assert told.endswith("-00") == (step == 1)
    assert [span.name for span in its.spans] == ["update", "ppo_step"]
    assert its.one("ppo_step").attributes["kleash.step"] == 2


def test_log_lines_name_the_trace_that_they_belong_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        with recorded(tmp_path) as its:
            configure_logging(style="json")
            with tracing.span("serves"):
                logging.getLogger("kleash.test").info("within")
            logging.getLogger("kleash.test").info("outside")
    finally:
        logging.getLogger().handlers[:], level = before
        logging.getLogger().setLevel(level)
    within, outside = map(json.loads, capsys.readouterr().err.splitlines())
    assert within["trace_id"] == its.one("serves").trace_id
    assert "trace_id" not in outside


# ---------------------------------------------------------------------------------- where spans go


def test_a_second_process_appends_to_the_file_and_is_another_one(tmp_path: Path) -> None:
    with recorded(tmp_path), tracing.span("works"):
        pass
    with recorded(tmp_path) as its, tracing.span("works"):
        pass
    first, second = its.named("works")
    assert first.process.instance != second.process.instance


def test_the_default_file_is_made_with_the_first_span(tmp_path: Path) -> None:
    path = tmp_path / "run" / "traces" / "trainer.jsonl"
    with traced(TrainerTracingConfig(exporter="file"), "trainer", file=path):
        assert not path.parent.exists()
        with tracing.root_span("ppo_step", is_sampled=True, step=1):
            pass
    assert path.is_file()


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = ServiceTracingConfig(exporter="file", file=tmp_path / "file" / "spans.jsonl")
    with pytest.raises(ConfigError, match=r"tracing\.file .* cannot be written: "):
        set_up(config, "reward")


def test_a_disk_that_is_gone_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "trainer.jsonl"
    with (
        traced(TrainerTracingConfig(exporter="file"), "trainer", file=path),
        tracing.root_span("ppo_step", is_sampled=True, step=1),
    ):
        pass
    assert f"the trace cannot be written to {path}" in caplog.text


@pytest.mark.parametrize(
    ("config_class", "keys", "sentence"),
    [
        (TracingConfig, {"file": "x"}, "file has no effect with exporter none; use file"),
        (
            TracingConfig,
            {"exporter": "file", "endpoint": "http://x"},
            "endpoint has no effect with exporter file; use otlp",
        ),
        (
            TracingConfig,
            {"exporter": "otlp", "endpoint": "collector:4318"},
            "endpoint is 'collector:4318'; write it as http://host:4318",
        ),
        (ServiceTracingConfig, {"exporter": "file"}, "file is required with exporter file"),
        (ServiceTracingConfig, {"sample_ratio": 0.5}, "sample_ratio has no effect"),
        (TrainerTracingConfig, {"sample_every": 10}, "sample_every has no effect"),
    ],
)
def test_keys_without_effect_are_refused(
    config_class: type[TracingConfig], keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_tree(config_class, keys)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes OTLP over HTTP."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    received: list[tuple[str, bytes]] = []
    handler = type("Handler", (Collector,), {"received": received})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("is_by_key", [True, False])
def test_a_collector_gets_otlp(
    collector: tuple[str, list[tuple[str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
    is_by_key: bool,
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    address, received = collector
    if not is_by_key:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "named-outside")
    config = TrainerTracingConfig(exporter="otlp", endpoint=address if is_by_key else None)
    with traced(config, "trainer"), tracing.root_span("ppo_step", is_sampled=True, step=4):
        pass
    ((path, body),) = received
    assert path == "/v1/traces"
    (part,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (span,) = part.scope_spans[0].spans
    assert span.name == "ppo_step"
    known = {pair.key: pair.value.string_value for pair in part.resource.attributes}
    assert known["service.name"] == ("kleash-trainer" if is_by_key else "named-outside")

"""Configuration of tracing, and how a process begins and ends it. docs/tracing.md explains both."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import pydantic

from kleash.base import tracing
from kleash.base.config import Config
from kleash.base.errors import ConfigError
from kleash.base.version import software_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# A file takes what comes at once: more spans wait for their line than for a collector.
FILE_QUEUE_SPANS, FILE_DELAY_MS = 65_536, 1000


class TracingConfig(Config):
    """Where spans go; nothing is measured while exporter is none."""

    exporter: Literal["none", "file", "otlp"] = "none"
    """none; file: lines of JSON that kleash trace reads; otlp: a collector, over HTTP."""
    file: Path | None = None
    """With the file exporter: the file of this process alone."""
    endpoint: str | None = None
    """With otlp: address of the collector, http://host:4318; null takes OTEL_EXPORTER_OTLP_ENDPOINT
    or this machine. The other OTEL_EXPORTER_OTLP_* and OTEL_BSP_* of the environment count too."""

    @pydantic.model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.file is not None and self.exporter != "file":
            raise ValueError(f"file has no effect with exporter {self.exporter}; use file")
        if self.endpoint is None:
            return self
        if self.exporter != "otlp":
            raise ValueError(f"endpoint has no effect with exporter {self.exporter}; use otlp")
        if not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint is {self.endpoint!r}; write it as http://host:4318")
        return self


class ServiceTracingConfig(TracingConfig):
    """Tracing of a process that serves."""

    sample_ratio: float = pydantic.Field(default=1.0, ge=0, le=1)
    """Share that is traced of the calls that come without a trace; a caller's own trace says for
    itself whether it is recorded."""

    @pydantic.model_validator(mode="after")
    def _a_file_needs_a_name(self) -> Self:
        if self.exporter == "file" and self.file is None:
            raise ValueError("file is required with exporter file: a path of this process alone")
        if self.exporter == "none" and self.sample_ratio != 1.0:
            raise ValueError("sample_ratio has no effect with exporter none; set exporter")
        return self


class TrainerTracingConfig(TracingConfig):
    """Tracing of PPO steps; a traced step is traced in the services, too, where they trace."""

    file: Path | None = None
    """With the file exporter: the file of this process alone; null is OUT/traces/trainer.jsonl."""
    sample_every: int = pydantic.Field(default=1, ge=1)
    """Steps between those that are traced; with 10 the steps 10, 20, 30 are."""

    @pydantic.model_validator(mode="after")
    def _steps_are_traced(self) -> Self:
        if self.exporter == "none" and self.sample_every != 1:
            raise ValueError("sample_every has no effect with exporter none; set exporter")
        return self


@contextlib.contextmanager
def traced(config: TracingConfig, service: str, *, file: Path | None = None) -> Iterator[None]:
    """Trace in the block as ``config`` says, as the process of that name.

    ``file`` is where lines go when the configuration names no file. Raises ConfigError without the
    packages, or for a file that cannot be written.
    """
    set_up(config, service, file=file)
    try:
        yield
    finally:
        tracing.shut_down()


def set_up(config: TracingConfig, service: str, *, file: Path | None = None) -> None:
    """As ``traced``, until ``tracing.shut_down``."""
    if config.exporter == "none":
        return
    try:
        from kleash.base.trace_recorder import OtelRecorder

        exporter = _exporter(config, file)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            f"tracing.exporter is {config.exporter}, and the package of {error.name} is not "
            "installed; pip install 'kleash[trace]', or set it to none."
        ) from None
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    processor = (
        BatchSpanProcessor(exporter, FILE_QUEUE_SPANS, FILE_DELAY_MS)
        if config.exporter == "file"
        else BatchSpanProcessor(exporter)
    )
    resource = {
        "service.name": f"kleash-{service}",
        "service.version": software_version(),
        "service.instance.id": uuid.uuid4().hex,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    ratio = config.sample_ratio if isinstance(config, ServiceTracingConfig) else 0.0
    tracing.install(OtelRecorder(processor, resource, sample_ratio=ratio))


def _exporter(config: TracingConfig, file: Path | None) -> SpanExporter:
    if config.exporter == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        endpoint = config.endpoint and config.endpoint.rstrip("/") + "/v1/traces"
        return OTLPSpanExporter(endpoint=endpoint)
    from kleash.base.trace_file import FileExporter

    path = config.file or file
    assert path is not None, "a process without a default file requires one"
    if config.file is not None:
        _check_writable(config.file)
    return FileExporter(path)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(
            f"tracing.file {path} cannot be written: {error.strerror or error}; name another."
        ) from None

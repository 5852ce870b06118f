"""Paths of the trainer's HTTP port: the run, its steps as they end, steering, and the live page.

GET  /              the page, which asks for the rest
GET  /v1/steps      server-sent events: "run" when something about the run changes, "step" for each
                    step with its number as the id; from ?from=STEP on, or after Last-Event-ID
GET  /v1/run        GET /v1/samples
POST /v1/run:pause  /v1/run:resume  /v1/run:checkpoint  /v1/run:stop, with the body {}

Bodies are the JSON mapping of the messages of kleash.trainer.v1; a figure that is not finite is
"NaN", "Infinity" or "-Infinity", as that mapping has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from kleash.rpc.errors import InvalidRequest
from kleash.rpc.http_api import Event, HttpApi, HttpPage, HttpRoute
from kleash.rpc.http_json import UNKNOWN_FIELD, WRONG_TYPE
from kleash.trainer.v1 import trainer_pb2

SERVICE = "kleash.trainer.v1.TrainerService"
FOLDER = Path(__file__).with_name("page")
POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'self'; script-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline, and in no other site's frame."""
MAX_DIGITS = 18
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def read_steps(last_event_id: Any, query: Mapping[str, str]) -> trainer_pb2.WatchStepsRequest:
    """From the step after ``last_event_id``, or ``from`` of the query; new steps without either.

    Raises InvalidRequest.
    """
    for name in query:
        if name != "from":
            raise InvalidRequest(
                f"the address has {name[:64]!r} in its query; there is from.",
                field=name[:64],
                reason=UNKNOWN_FIELD,
            )
    from_step = _step(query.get("from", "0"), "from")
    if last_event_id:
        from_step = _step(last_event_id, "Last-Event-ID") + 1
    return trainer_pb2.WatchStepsRequest(from_step=from_step, include_run=True)


def _step(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise InvalidRequest(
            f"{name} is {text[:64]!r}; it must be the number of a step.",
            field=name,
            reason=WRONG_TYPE,
        )
    return int(text)


def write(message: Message) -> dict[str, Any]:
    """The JSON value of a message, with figures that are not finite."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def event(response: trainer_pb2.WatchStepsResponse) -> Event:
    """Of a step, or of the run."""
    if response.HasField("run"):
        return Event("run", write(response.run))
    return Event("step", write(response.metrics), event_id=str(response.metrics.step))


def _pages() -> dict[str, HttpPage]:
    """The page, and what it loads."""
    files = {f"/{path.name}": path for path in sorted(FOLDER.iterdir()) if path.suffix in _TYPES}
    files["/"] = files.pop("/index.html")
    return {path: HttpPage(file, _TYPES[file.suffix], POLICY) for path, file in files.items()}


API = HttpApi(
    routes=(
        HttpRoute("GET", "/v1/run", SERVICE, "GetRun", write=write),
        HttpRoute("GET", "/v1/steps", SERVICE, "WatchSteps", read=read_steps, event=event),
        HttpRoute("GET", "/v1/samples", SERVICE, "ListSamples", write=write),
        HttpRoute("POST", "/v1/run:pause", SERVICE, "Pause"),
        HttpRoute("POST", "/v1/run:resume", SERVICE, "Resume"),
        HttpRoute("POST", "/v1/run:checkpoint", SERVICE, "SaveCheckpoint"),
        HttpRoute("POST", "/v1/run:stop", SERVICE, "Stop"),
    ),
    pages=_pages(),
)

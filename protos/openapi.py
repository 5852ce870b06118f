"""Writes services/kleash/reward/openapi.json from the protos, their comments and the paths.

    python protos/openapi.py

Comments are in the .proto files alone: buf reads them. A test fails when the file is stale.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

from kleash.reward import http
from kleash.rpc.http_api import HttpRoute

PROTOS = Path(__file__).parent
OUTPUT = Path(http.__file__).with_name("openapi.json")
DESCRIPTION = """\
Scores text or token sequences with a reward model. The bodies are the JSON mapping of the messages
of `kleash.reward.v1`, the API that the gRPC port serves: names may be written as `item_id` or
`itemId` and come back as `item_id`; bytes are base64 (per-token values are little-endian float32
or int32); 64-bit integers come back as strings. A field that is not known is refused.
"""
TIMEOUT = {
    "name": "X-Request-Timeout-S",
    "in": "header",
    "description": "Seconds that the caller waits; an answer that cannot be there by then is "
    "refused. `Grpc-Timeout: 2500m` says the same.",
    "schema": {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?$"},
    "example": "2.5",
}
REASONS = {
    "400": "The request cannot be used: `field` tells where, `reason` why. Or it does not fit the "
    "server's state.",
    "401": "The server wants to know who calls, and the token is absent, wrong or expired.",
    "403": "The caller may not call.",
    "404": "The model or its revision is not served here.",
    "413": "The body is larger than the server's limit.",
    "415": "The body is not said to be JSON, or is compressed.",
    "429": "No room in the queue, or beyond the caller's quota. Try again after `Retry-After`.",
    "500": "The server failed; its log explains it under `metadata.correlation_id`.",
    "503": "Loading, or stopping; or the server cannot ask who calls.",
    "504": "Not answered within the time that the caller or the server allows.",
}
ERROR = {
    "description": "What went wrong.",
    "type": "object",
    "additionalProperties": False,
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "additionalProperties": False,
            "required": ["code", "message", "field", "reason"],
            "properties": {
                "code": {
                    "type": "string",
                    "description": "The gRPC status, such as INVALID_ARGUMENT.",
                },
                "message": {
                    "type": "string",
                    "description": "A sentence with the values seen and the remedy.",
                },
                "field": {
                    "type": "string",
                    "description": "Path of the field at fault, `items[3].text`; or empty.",
                },
                "reason": {
                    "type": "string",
                    "description": "The cause for programs, such as TOKENIZER_MISMATCH.",
                },
                "retry_after_s": {
                    "type": "number",
                    "description": "When it may work, as the header Retry-After.",
                },
                "metadata": {
                    "type": "object",
                    "additionalProperties": {"type": "string"},
                    "description": "Values behind the message.",
                },
            },
        }
    },
}
HEALTH = {
    "description": "Whether it is so, as the status code tells, too.",
    "type": "object",
    "additionalProperties": False,
    "required": ["status"],
    "properties": {"status": {"enum": ["SERVING", "NOT_SERVING"]}},
}
TURN = {"role": "user", "content": "What is 3 plus 4?"}
ANSWER = {"role": "assistant", "content": "3 plus 4 is 7."}
TEXTS = [{"item_id": "a", "conversation": {"messages": [TURN, ANSWER]}}]
EXAMPLES: dict[str, Any] = {
    "Score": {"items": TEXTS},
    "ScoreStream": {"item": TEXTS[0]},
    "Compare": {"prompt": {"messages": [TURN]}, "responses": ["3 plus 4 is 7.", "It is 8."]},
    "CountTokens": {"items": TEXTS},
    "GetReward": {"query": ["What is 3 plus 4? 3 plus 4 is 7."]},
}
"""Of the bodies, by operation."""
_F = FieldDescriptorProto
SCALARS: dict[int, dict[str, Any]] = {
    _F.TYPE_STRING: {"type": "string"},
    _F.TYPE_BYTES: {
        "type": "string",
        "contentEncoding": "base64",
        "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    },
    _F.TYPE_BOOL: {"type": "boolean"},
    _F.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    _F.TYPE_UINT64: {"type": "string", "pattern": "^[0-9]{1,20}$"},
    _F.TYPE_FLOAT: {"type": "number"},
    _F.TYPE_DOUBLE: {"type": "number"},
}


class Protos:
    """Descriptors with their comments, by full name."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self.messages: dict[str, DescriptorProto] = {}
        self.enums: dict[str, EnumDescriptorProto] = {}
        self.methods: dict[str, MethodDescriptorProto] = {}
        self.comments: dict[str, str] = {}
        for file in files.file:
            comments = {
                tuple(place.path): _joined(place.leading_comments)
                for place in file.source_code_info.location
            }
            for number, message in enumerate(file.message_type):
                name = f".{file.package}.{message.name}"
                self.messages[name] = message
                self._keep(name, comments, (4, number), [field.name for field in message.field])
            for number, enum in enumerate(file.enum_type):
                name = f".{file.package}.{enum.name}"
                self.enums[name] = enum
                self._keep(name, comments, (5, number), [value.name for value in enum.value])
            for number, service in enumerate(file.service):
                name = f".{file.package}.{service.name}"
                self.methods |= {f"{name}.{method.name}": method for method in service.method}
                self._keep(name, comments, (6, number), [method.name for method in service.method])

    def _keep(
        self, name: str, comments: dict[Any, str], path: tuple[int, ...], parts: Iterable[str]
    ) -> None:
        self.comments[name] = comments.get(path, "")
        for number, part in enumerate(parts):
            self.comments[f"{name}.{part}"] = comments.get((*path, 2, number), "")


class Schemas:
    """Schemas of the messages that are asked for, and of those within them."""

    def __init__(self, protos: Protos) -> None:
        self._protos = protos
        self.found: dict[str, Any] = {}

    def refer(self, name: str, *, is_answer: bool) -> dict[str, str]:
        """A reference to the schema of a message or an enum, which is made at the first."""
        short = name.rpartition(".")[2]
        if short not in self.found:
            self.found[short] = {}
            is_enum = name in self._protos.enums
            self.found[short] = self._enum(name) if is_enum else self._message(name, is_answer)
        return {"$ref": f"#/components/schemas/{short}"}

    def _enum(self, name: str) -> dict[str, Any]:
        values = [value.name for value in self._protos.enums[name].value]
        lines = [f"- `{value}`: {self._protos.comments[f'{name}.{value}']}" for value in values]
        text = "\n".join([self._protos.comments[name], "", *lines])
        return {"description": text, "type": "string", "enum": values}

    def _message(self, name: str, is_answer: bool) -> dict[str, Any]:
        message = self._protos.messages[name]
        schema: dict[str, Any] = {
            "description": self._protos.comments[name],
            "type": "object",
            "additionalProperties": False,
            "properties": {
                field.name: self._field(name, field, is_answer) for field in message.field
            },
        }
        always = [
            field.name for field in message.field if field.type != _F.TYPE_MESSAGE or _many(field)
        ]
        if is_answer and always:
            schema["required"] = always
        choices = [field.name for field in message.field if field.HasField("oneof_index")]
        if choices:
            schema["oneOf"] = [{"required": [choice]} for choice in choices]
        return schema

    def _field(self, name: str, field: FieldDescriptorProto, is_answer: bool) -> dict[str, Any]:
        if field.type in (_F.TYPE_MESSAGE, _F.TYPE_ENUM):
            schema: dict[str, Any] = self.refer(field.type_name, is_answer=is_answer)
        else:
            schema = dict(SCALARS[field.type])
        if _many(field):
            schema = {"type": "array", "items": schema}
        return {"description": self._protos.comments[f"{name}.{field.name}"], **schema}


def build() -> str:
    """The document, as the file holds it."""
    protos = Protos(_read())
    schemas = Schemas(protos)
    paths: dict[str, Any] = {}
    for route in http.API.routes:
        operation = _get_reward(schemas) if route.read else _operation(route, protos, schemas)
        paths.setdefault(route.path, {})[route.verb.lower()] = operation
    for path, what in (("/healthz", "the process is alive"), ("/readyz", "calls are served")):
        paths[path] = {"get": _health(path, what)}
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Kleash reward service",
            "version": "v1",
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": {**dict(sorted(schemas.found.items())), "Error": ERROR, "Health": HEALTH},
            "responses": {name: _error(text) for name, text in REASONS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "certificate": {"type": "mutualTLS"},
            },
        },
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _operation(route: HttpRoute, protos: Protos, schemas: Schemas) -> dict[str, Any]:
    name = f".{route.service}.{route.method}"
    method = protos.methods[name]
    lines = method.client_streaming
    kind = "application/x-ndjson" if lines else "application/json"
    told = protos.comments[name]
    if lines:
        told += (
            "\n\nBoth bodies are lines, of one message each. Results come while items are still "
            "being sent: a caller reads while it writes. After the first result an error is the "
            "last line."
        )
    answer = schemas.refer(method.output_type, is_answer=True)
    operation: dict[str, Any] = {
        "operationId": route.method,
        "summary": told.split(". ")[0].split("\n")[0].rstrip(".;") + ".",
        "description": told,
        "parameters": [TIMEOUT],
    }
    if route.verb == "GET":
        message = protos.messages[method.input_type]
        operation["parameters"] = [
            *(
                {
                    "name": field.name,
                    "in": "query",
                    "description": protos.comments[f"{method.input_type}.{field.name}"],
                    "schema": {"type": "string"},
                }
                for field in message.field
            ),
            TIMEOUT,
        ]
    else:
        schema = schemas.refer(method.input_type, is_answer=False)
        body = {"schema": schema, "example": EXAMPLES[route.method]}
        operation["requestBody"] = {"required": True, "content": {kind: body}}
    operation["responses"] = _responses(kind, answer)
    return operation


def _get_reward(schemas: Schemas) -> dict[str, Any]:
    numbers = {"type": "array", "items": {"type": "number"}}
    texts: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
    queries = (
        ("model", {"type": "string"}, "Model name; empty means the default model."),
        ("revision", {"type": "string"}, "Exact model revision; empty means the newest one."),
        (
            "truncation",
            {"enum": [*http.TRUNCATIONS]},
            "What to do with a text longer than the model accepts; error fails the request.",
        ),
        ("normalize", {"enum": [*http.BOOLEANS]}, "Whether scores are (score - mean) / std."),
    )
    schemas.found["GetRewardRequest"] = {
        "description": "What OpenRLHF sends.",
        "type": "object",
        "required": ["query"],
        "properties": {
            "query": {**texts, "description": "Texts to score, each a prompt with its response."},
            "prompts": {"description": "Not read."},
            "labels": {"description": "Not read."},
        },
    }
    schemas.found["GetRewardResponse"] = {
        "description": "What OpenRLHF reads.",
        "type": "object",
        "additionalProperties": False,
        "required": ["rewards", "scores", "extra_logs"],
        "properties": {
            "rewards": {**numbers, "description": "One score per text."},
            "scores": {**numbers, "description": "The same."},
            "extra_logs": {
                "type": "object",
                "additionalProperties": numbers,
                "description": "Parts of the scores, of a model with several heads or members.",
            },
        },
    }
    schema = {"$ref": "#/components/schemas/GetRewardRequest"}
    body = {"schema": schema, "example": EXAMPLES["GetReward"]}
    return {
        "operationId": "GetReward",
        "summary": "Scores texts as OpenRLHF's reward server does.",
        "description": "For trainers that have this address as their remote reward URL. Texts go "
        "to the tokenizer unchanged. A text without a score fails the whole request.",
        "parameters": [
            *(
                {"name": name, "in": "query", "schema": schema, "description": text}
                for name, schema, text in queries
            ),
            TIMEOUT,
        ],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": _responses(
            "application/json", {"$ref": "#/components/schemas/GetRewardResponse"}
        ),
    }


def _health(path: str, what: str) -> dict[str, Any]:
    answer = {"application/json": {"schema": {"$ref": "#/components/schemas/Health"}}}
    return {
        "operationId": path.strip("/"),
        "summary": f"Whether {what}.",
        "description": "Open to everybody.",
        "security": [],
        "responses": {
            "200": {"description": "It is so.", "content": answer},
            "503": {"description": "It is not.", "content": answer},
        },
    }


def _responses(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"200": {"description": "Done.", "content": {kind: {"schema": schema}}}}
    return found | {name: {"$ref": f"#/components/responses/{name}"} for name in REASONS}


def _error(text: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _many(field: FieldDescriptorProto) -> bool:
    return field.label == _F.LABEL_REPEATED


def _joined(comment: str) -> str:
    return " ".join(comment.split())


def _read() -> FileDescriptorSet:
    buf = Path(sys.executable).with_name("buf")
    raw = subprocess.run(
        [buf, "build", "--output", "-#format=binpb"], cwd=PROTOS, check=True, capture_output=True
    ).stdout
    return FileDescriptorSet.FromString(raw)


if __name__ == "__main__":
    OUTPUT.write_text(build(), encoding="utf-8")

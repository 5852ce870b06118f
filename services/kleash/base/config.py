"""Typed configuration: defaults < TOML or JSON file < ``--a.b=c`` flags. Nothing else is read.

One frozen class per process. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic_core import to_jsonable_python

from kleash.base.errors import ConfigError


class Config(pydantic.BaseModel):
    """Base of every configuration class: frozen, closed to unknown keys, documented per field."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


C = TypeVar("C", bound=Config)


def _check_run_id(run_id: str | None) -> str | None:
    if run_id is None or re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", run_id):
        return run_id
    raise ValueError(
        "must be at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"
    )


RunId = Annotated[str | None, pydantic.AfterValidator(_check_run_id)]
"""Name of a run that several stages belong to; it is a label of Kubernetes objects, too."""


def load_config(config_class: type[C], arguments: Sequence[str]) -> C:
    """Build a configuration from command-line arguments.

    At most one argument without leading dashes is the path of a TOML or JSON file. Flags are
    ``--section.key=value`` or ``--section.key value``; dashes in a key count as underscores, and
    ``--flag`` alone means true. Values are JSON or TOML literals where the field is not a string;
    a list may also be given as ``a,b,c``.

    Raises ConfigError with one sentence per problem.
    """
    path, overrides = _split_arguments(config_class, arguments)
    tree = _read_file(path) if path else {}
    for key, value in overrides:
        _set_nested(tree, key, value)
    return parse_tree(config_class, tree, place=str(path) if path else "")


def parse_tree(config_class: type[C], tree: Mapping[str, Any], *, place: str = "") -> C:
    """Build a configuration from nested mappings that were read from ``place``.

    Raises ConfigError with one sentence per problem.
    """
    try:
        return config_class.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(config_class, error, place)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as JSON, which ``load_config`` reads back."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(config.model_dump(mode="json"), indent=2)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def describe_config(config_class: type[Config]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, documentation) for every field, nested sections flattened."""
    for key, field in _fields(config_class):
        default = "required"
        if not field.is_required():
            default = json.dumps(to_jsonable_python(field.get_default(call_default_factory=True)))
        text = " ".join((field.description or "").split())
        yield key, _type_name(field.annotation), default, text


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(annotation))
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _section(annotation: Any) -> type[Config] | None:
    """The nested configuration class of a field, also when it is optional."""
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Config):
            return part
    return None


def _fields(config_class: type[Config], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in config_class.model_fields.items():
        if section := _section(field.annotation):
            yield from _fields(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _split_arguments(
    config_class: type[Config], arguments: Sequence[str]
) -> tuple[Path | None, list[tuple[str, Any]]]:
    known = dict(_fields(config_class))
    path: Path | None = None
    overrides: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            if path is not None:
                raise ConfigError(
                    f"two configuration files, {path} and {argument}: give one; "
                    "flags start with --."
                )
            path = Path(argument)
            continue
        key, equals, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            is_bool = key in known and known[key].annotation is bool
            has_value = bool(rest) and (
                rest[0] in ("true", "false") if is_bool else not rest[0].startswith("--")
            )
            text = rest.pop(0) if has_value else "true"
        overrides.append((key, _parse_value(text, known.get(key))))
    return path, overrides


def _parse_value(text: str, field: Any) -> Any:
    if field is not None and field.annotation in (str, Path, str | None, Path | None):
        return None if text == "null" and field.annotation in (str | None, Path | None) else text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        is_list = field is not None and typing.get_origin(field.annotation) in (tuple, list)
        return text.split(",") if is_list else text


def _read_file(path: Path) -> dict[str, Any]:
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot read the configuration file {path}: {reason}.") from None
    except ValueError as error:  # also a file that is not UTF-8
        raise ConfigError(f"{path} is not valid {kind}: {error}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(tree).__name__}.")
    return tree


def _set_nested(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        branch = tree.setdefault(parent, {})
        if not isinstance(branch, dict):
            branch = tree[parent] = {}
        tree = branch
    tree[last] = value


def _explain(config_class: type[Config], error: pydantic.ValidationError, place: str) -> str:
    keys = [key for key, _ in _fields(config_class)]
    known = [*keys, *sorted({key.rpartition(".")[0] for key in keys} - {""})]
    sentences = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "--help lists the keys."
            sentences.append(f"unknown key '{key}'; {hint}")
        elif problem["type"] == "missing":
            sentences.append(f"'{key}' is required; set it in the file or with --{key}=VALUE.")
        else:
            where = f"'{key}'" if key else "configuration"
            seen = "" if isinstance(problem["input"], Mapping) else f" (got {problem['input']!r})"
            sentences.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}{seen}")
    text = "; ".join(sentence.rstrip(".") for sentence in sentences)
    text = f"{place}: {text}" if place else text
    return text if text.endswith("?") else f"{text}."

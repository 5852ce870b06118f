"""Addresses of models, checked before anything is asked for."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kleash.base.errors import ConfigError

Kind = Literal["folder", "hub", "arrow", "http", "fsspec"]
"""How a source is read: as a folder of this machine, from the Hub, with pyarrow, with urllib, or
with whatever fsspec knows."""

FORMS = "a folder, hf://ORG/NAME@REVISION, s3://BUCKET/PATH, gs://BUCKET/PATH or https://HOST/PATH"

_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IN_THE_CLUSTER = {
    "pvc": "a folder on a claim",
    "demo": "a folder of the demo's run",
    "oci": "an image volume",
}


@dataclass(frozen=True)
class Source:
    """Where a model is."""

    uri: str
    """As it was given; recorded beside what was fetched."""
    kind: Kind
    path: Path = Path()
    """Of a folder."""
    repo: str = ""
    """Of the Hub."""
    revision: str = ""
    """Commit, branch or tag on the Hub."""

    def __str__(self) -> str:
        return self.uri


def parse_source(uri: str) -> Source:
    """What ``uri`` names. Raises ConfigError with the remedy."""
    scheme, separator, rest = uri.partition("://")
    scheme = scheme.lower()
    if not separator:
        if re.match(r"(hf|s3|gs|https?|file):", uri):
            raise ConfigError(f"{uri!r} is no address: two slashes follow the colon.")
        return _folder(uri, uri)
    if scheme == "hf":
        return _hub(uri, rest)
    if scheme in _IN_THE_CLUSTER:
        raise ConfigError(
            f"{uri} is {_IN_THE_CLUSTER[scheme]} that the chart mounts into its pods; "
            "give the folder where it is mounted."
        )
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and (scheme, user) != ("gs", "anonymous"):  # pyarrow's way to read what is public
        raise ConfigError(
            f"the address {scheme}://... holds a user name or a key, and addresses are written to "
            "logs and files; take it out and give credentials in the environment."
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigError(f"{uri} is not absolute; write file:///PATH, or the plain path.")
        return _folder(uri, urllib.parse.unquote(rest))
    if not rest.strip("/"):
        raise ConfigError(f"{uri} names no place; give {FORMS}.")
    if scheme in ("s3", "gs", "gcs"):
        return Source(uri, "arrow")
    if scheme in ("http", "https"):
        return Source(uri, "http")
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise ConfigError(f"{uri}: nothing here reads {scheme}:// addresses; give {FORMS}.")
    return Source(uri, "fsspec")


def _folder(uri: str, path: str) -> Source:
    if not path.strip():
        raise ConfigError(f"the model's address is empty; give {FORMS}.")
    return Source(uri, "folder", path=Path(path))


def _hub(uri: str, rest: str) -> Source:
    repo, _, revision = rest.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise ConfigError(f"{uri} is no repository of the Hub; write hf://ORG/NAME@REVISION.")
    if not revision:
        raise ConfigError(
            f"{uri} has no revision, and a repository changes; write hf://{repo}@REVISION, "
            "best with the commit's 40 digits."
        )
    return Source(uri, "hub", repo=repo, revision=revision)

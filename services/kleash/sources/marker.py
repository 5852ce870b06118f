"""``kleash-fetch.json``: where a fetched folder came from, and its files with sizes and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from kleash.base.version import software_version
from kleash.sources.checkpoint import MARKER


@dataclass(frozen=True)
class FetchedFile:
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Marker:
    """What a fetch brought."""

    source: str
    revision: str
    """The commit on the Hub; empty elsewhere."""
    files: tuple[FetchedFile, ...]
    """By name."""

    @property
    def sha256(self) -> str:
        """Of the output of ``sha256sum`` for the files, sorted by name."""
        return digest_of(self.files)

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def write(self, folder: Path) -> None:
        """Into ``folder``, whose other files are complete."""
        content = {
            "source": self.source,
            "revision": self.revision,
            "sha256": self.sha256,
            "created_by": f"kleash {software_version()}",
            "files": [asdict(file) for file in self.files],
        }
        (folder / MARKER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def damage(self, folder: Path) -> str:
        """The first file that is not as long as it was written; empty when all are."""
        for file in self.files:
            path = folder / file.name
            if not path.is_file():
                return f"{file.name} is missing"
            if (num_bytes := path.stat().st_size) != file.bytes:
                return f"{file.name} has {num_bytes} of {file.bytes} bytes"
        return ""


def read_marker(folder: Path) -> Marker | None:
    """The marker of a folder; None when there is none that can be read."""
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = tuple(FetchedFile(**entry) for entry in content["files"])
        return Marker(content["source"], content["revision"], files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest_of(files: Iterable[FetchedFile]) -> str:
    """Hash of hashes: the same for the same names and bytes, wherever they came from."""
    lines = (f"{file.sha256}  {file.name}\n" for file in sorted(files, key=lambda it: it.name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe_file(path: Path) -> FetchedFile:
    """Size and hash of a file, read once."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FetchedFile(path.name, path.stat().st_size, sha256)

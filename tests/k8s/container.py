"""A container of an image in buildah's storage, run by runc or crun as Kubernetes would run it.

Read-only root, an arbitrary UID in group 0, no capability, no new privileges, PID namespace of its
own. The network is the host's: a test reaches the ports on 127.0.0.1. It needs root.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

UID = 123456
"""A user that no image knows, as OpenShift gives one to each namespace."""


def runtime() -> str | None:
    """The program that runs containers; crun refuses machines with both versions of cgroups."""
    return shutil.which("runc") or shutil.which("crun")


def image_config(image: str) -> dict[str, Any]:
    """The image's configuration as its OCI document: Env, Entrypoint, User, Labels, ..."""
    command = ["buildah", "inspect", "--type", "image", image]
    listing = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return json.loads(listing.stdout)["OCIv1"]["config"]


class Container:
    """One container; used as a context it is killed and removed at the end, if it still runs."""

    def __init__(
        self,
        image: str,
        arguments: Sequence[str],
        folder: Path,
        *,
        entrypoint: Sequence[str] | None = None,
        volumes: Mapping[str, Path] | None = None,
    ) -> None:
        """``arguments`` follow the image's entrypoint, or ``entrypoint`` where that is given.

        ``folder`` is empty and gets the bundle, ``stdout`` and ``stderr``. ``volumes``: folders of
        this machine by their path in the container, read-only there; /tmp and /cache are empty and
        may be written, all the rest may not.
        """
        self.name = f"kleash-test-{uuid.uuid4().hex[:12]}"
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        self._bundle = folder
        found = runtime()
        assert found is not None, "neither runc nor crun is there"
        self._runtime = found
        config = image_config(image)
        self._command = [*(config["Entrypoint"] if entrypoint is None else entrypoint), *arguments]
        self._working = _run("buildah", "from", "--pull-never", image).strip()
        root = _run("buildah", "mount", self._working).strip()
        specification = _specification(config, self._command, root, volumes or {})
        (folder / "config.json").write_text(json.dumps(specification))

    def __enter__(self) -> Self:
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [self._runtime, "run", "--bundle", self._bundle, self.name],
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(30)
        _run("buildah", "rm", self._working)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the container's first process."""
        _run(self._runtime, "kill", self.name, str(number.value))

    def wait(self, timeout_s: float) -> int:
        """The exit status of the first process, once it ended."""
        return self.process.wait(timeout_s)

    def output(self) -> str:
        """What it wrote so far, for the message of a failure."""
        return f"{self.stdout.read_text()}\n{self.stderr.read_text()}"


def _specification(
    config: Mapping[str, Any], command: Sequence[str], root: str, volumes: Mapping[str, Path]
) -> dict[str, Any]:
    writable = ["nosuid", "nodev"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": UID, "gid": 0},
            "args": list(command),
            "env": list(config["Env"]),
            "cwd": config["WorkingDir"] or "/",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "root": {"path": root, "readonly": True},
        "hostname": "kleash-test",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "mode=755", "size=65536k"],
            },
            *(
                {
                    "destination": path,
                    "type": "tmpfs",
                    "source": "tmpfs",
                    "options": [*writable, "mode=1777"],
                }
                for path in ("/dev/shm", "/tmp", "/cache")
            ),
            *(
                {
                    "destination": path,
                    "type": "bind",
                    "source": str(folder),
                    "options": ["rbind", "ro"],
                }
                for path, folder in volumes.items()
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
    }


def _run(*command: str) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout

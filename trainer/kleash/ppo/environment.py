"""What a run was computed with: environment.json of the run folder, an entry for each start.

Software, machine, command line, seeds and digests; never the values of secrets. A figure that
cannot be had, such as the revision of a kleash that was installed from a wheel, is null.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kleash.base.version import software_version
from kleash.ppo.config import PPOConfig
from kleash.ppo.randomness import sampling_seed

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "grpcio", "protobuf", "datasets")
"""Those whose version can change a run's figures, or how it talks to its services."""

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM")
"""Of the environment, that change how a run computes; no other is recorded."""

GIT_TIMEOUT_S = 10.0
HIDDEN = "***"
_SECRET_FLAG = re.compile(
    r"--(?!pad_token\b)[^=]*?(?:\b|_)(?:token|secret|password|api_key)(?:=|$)", re.IGNORECASE
)
_USER_OF_URL = re.compile(r"(://)[^/@\s]+@")


def describe_start(
    config: PPOConfig,
    *,
    from_step: int,
    seen_step: int,
    digests: Mapping[str, str],
    lineage: Mapping[str, Any],
) -> dict[str, Any]:
    """An entry of environment.json: a trainer starts after ``from_step`` steps of the run, of
    which ``seen_step`` were done once before it went back to a checkpoint."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "from_step": from_step,
        "seen_step": seen_step,
        "host": socket.gethostname(),
        "command": without_secrets(sys.argv),
        "software": _software(),
        "machine": _machine(config.device),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "seeds": describe_seeds(config),
        "digests": dict(digests),
        "lineage": {
            "lineage_id": lineage.get("lineage_id"),
            "parent": str(config.model),
            "reward_model": str(config.reward_model) if config.reward_model else None,
        },
    }


def describe_seeds(config: PPOConfig) -> dict[str, Any]:
    """Which seed each purpose uses; the functions are those of ``kleash.ppo.randomness``.

    Permutations are drawn from the configuration's seed, the purpose's name and the epoch together.
    """
    return {
        "seed": config.seed,
        "prompts": config.seed,
        "minibatches": config.seed,
        "pretraining": config.seed if config.ptx.data is not None else None,
        "sampling_step_1": sampling_seed(config.seed, 1),
        "sampling_evaluation": sampling_seed(config.seed, 0),
    }


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command line with values hidden that may be secrets: users in addresses, and values of
    flags that are named token, secret, password or api_key. No key of a configuration is."""
    shown: list[str] = []
    hides_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        is_secret = bool(_SECRET_FLAG.match("--" + name[2:].replace("-", "_") + equals))
        if is_secret and equals:
            word = f"{name}={HIDDEN}"
        elif hides_next and not word.startswith("--"):
            word = HIDDEN
        hides_next = is_secret and not equals
        shown.append(_USER_OF_URL.sub(rf"\1{HIDDEN}@", word))
    return shown


def _software() -> dict[str, Any]:
    return {
        "kleash": software_version(),
        "revision": source_revision(Path(__file__)),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_revision(path: Path) -> str | None:
    """Commit of the git checkout that tracks the file ``path``, with ``+changes`` when files of it
    differ; None where there is none, as for an installed wheel."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(path.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=GIT_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A virtual environment may lie in the checkout of something else.
    if git("ls-files", "--error-unmatch", path.name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if revision and changes else revision


def _machine(device: str) -> dict[str, Any]:
    import torch

    gpus = []
    if device.startswith("cuda"):
        gpus = [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in range(torch.cuda.device_count())
        ]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "device": device,
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """As the kernel calls it, or else the architecture."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()

"""Which trainer a command means: an address, or a run folder of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kleash.base.errors import ConfigError, UserError
from kleash.client.trainer import TrainerClient
from kleash.rpc.errors import NotFound, Unavailable

VARIABLE = "KLEASH_TRAINER_ADDRESS"
HELP = (
    "HOST:PORT of the trainer's gRPC service, or the run folder of a trainer on this machine; "
    f"{VARIABLE} without it"
)


class Target(NamedTuple):
    """A trainer."""

    address: str
    run_id: str
    """Of the run that it must have; empty for any."""
    folder: Path | None


def find_trainer(name: str | None) -> Target:
    """What ``name`` stands for. Raises ConfigError; UserError for a folder without a trainer."""
    name = name or os.environ.get(VARIABLE, "")
    if not name:
        raise ConfigError(
            f"name the trainer, as HOST:PORT or by its run folder, or set {VARIABLE}."
        )
    folder = Path(name)
    if folder.is_dir():
        return _of_folder(folder)
    if re.search(r":\d+$", name) or "://" in name or name.startswith("unix:"):
        return Target(name, "", None)
    raise ConfigError(
        f"'{name}' is neither a folder here nor HOST:PORT; for a run on a cluster forward the "
        "trainer's port first: kubectl port-forward service/kleash-trainer 50051."
    )


def _of_folder(folder: Path) -> Target:
    path = folder / "trainer.json"
    if not path.is_file():
        what = "has had no trainer yet" if (folder / "run.json").is_file() else "holds no run"
        raise UserError(f"{folder} {what}; kleash ppo --out={folder} starts one.")
    noted = json.loads(path.read_text(encoding="utf-8"))
    return Target(noted["address"], noted["run_id"], folder)


@contextlib.contextmanager
def connected(target: Target, *, timeout_s: float = 600.0) -> Iterator[TrainerClient]:
    """A client of the trainer, after it has answered. Raises ServiceError and UserError."""
    with TrainerClient(target.address, timeout_s=timeout_s) as client:
        try:
            run = client.get_run()
        except Unavailable as error:
            if target.folder is None or error.reason == "TLS":
                raise
            raise UserError(
                f"no trainer works in {target.folder} now (the last one was at {target.address}); "
                f"kleash ppo --out={target.folder} --resume goes on with its run."
            ) from None
        check_run(target, run.run_id)
        yield client


def check_run(target: Target, run_id: str) -> None:
    """Raises NotFound when the trainer has another run than that of the folder."""
    if target.run_id and run_id and run_id != target.run_id:
        raise NotFound(
            f"the trainer at {target.address} has the run {run_id}, and {target.folder} holds "
            f"{target.run_id}, whose trainer is gone.",
            reason="NO_SUCH_RUN",
        )

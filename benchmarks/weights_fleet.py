"""Publication to real replicas for weights.py: seconds, pause and memory of both sides.

Replicas are ``kleash serve policy`` processes on loopback. The trainer's side is a child process
of its own, so that its peak memory is its own: ``python benchmarks/weights_fleet.py SPEC.json``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
UPDATE_STD = 1e-6
"""Standard deviation of the update of a weight: that of AdamW at lr 1e-6, to within a factor."""

START_S = 60.0


def larger_model(folder: Path) -> Path:
    """A checkpoint of about 31 million elements with random weights."""
    from kleash.lm.tiny import build_causal_lm, train_tokenizer

    model = build_causal_lm("llama", vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8)
    model.save_pretrained(folder)
    train_tokenizer(["a small text"], 320).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def replicas(model: Path, count: int, dtype: str, folder: Path) -> Iterator[list[tuple[str, int]]]:
    """(address, process id) of ``count`` policy services that have loaded ``model``."""
    from kleash.client.policy import PolicyClient
    from kleash.ppo.services import wait_for
    from kleash.up.supervisor import free_port, kleash_command

    folder.mkdir(parents=True, exist_ok=True)
    processes, found = [], []
    try:
        for index in range(count):
            port = free_port()
            command = kleash_command(
                "serve",
                "policy",
                f"--model={model}",
                f"--server.port={port}",
                f"--dtype={dtype}",
                "--device=cpu",
                "--num_threads=1",
            )
            with (folder / f"replica-{index}.log").open("ab") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            processes.append(process)
            found.append((f"127.0.0.1:{port}", process.pid))
        for address, _ in found:
            with contextlib.closing(PolicyClient(address, checks_health=False)) as client:
                wait_for("policy", address, client.get_policy, START_S)
        yield found
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=START_S)


def memory(process_id: int) -> dict[str, int]:
    """Resident bytes now, without the pages of files, and at the peak since ``reset_peak``."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process_id}/status").read_text().splitlines()
    )
    kib = {name: int(fields[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssAnon")}
    return {name: value * 1024 for name, value in kib.items()}


def reset_peak(process_id: int) -> None:
    """Let VmHWM begin again at what is resident now."""
    Path(f"/proc/{process_id}/clear_refs").write_text("5")


def publish_rounds(
    model: Path, count: int, dtype: str, rounds: int, *, is_generating: bool = False
) -> dict[str, Any]:
    """Seconds, pause, bytes and memory of full and delta publications to ``count`` replicas.

    One that loads a checkpoint serves weights that the trainer's shadow does not know, so its first
    publication is a full one. Every round starts with new processes. With ``is_generating`` every
    replica decodes responses meanwhile, and the pause is that of running responses.
    """
    kinds: dict[str, list[dict[str, Any]]] = {"full": [], "delta": []}
    for _ in range(rounds):
        for row in _publish_run(model, count, dtype, is_known=False, is_generating=is_generating):
            kinds[row["kind"]].append(row)
    return {kind: _medians(rows) for kind, rows in kinds.items()}


def delta_memory(model: Path, dtype: str) -> dict[str, float]:
    """Peak MiB over what was resident before, of a run that sends deltas alone.

    Trainer and replica begin with the same weights, as in a run of RLHF; the trainer's shadow is
    not counted.
    """
    rows = _publish_run(model, 1, dtype, is_known=True)
    return {
        side: max(row[f"{side}_above_start_mib"] for row in rows) for side in ("trainer", "replica")
    }


def _publish_run(
    model: Path, count: int, dtype: str, *, is_known: bool, is_generating: bool = False
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with replicas(model, count, dtype, folder / "logs") as found:
            spec = {
                "model": str(model),
                "store": str(folder / "store"),
                "replicas": found,
                "deltas": 4,
                "is_known": is_known,
                "is_generating": is_generating,
            }
            path = folder / "spec.json"
            path.write_text(json.dumps(spec))
            result = subprocess.run(
                [sys.executable, __file__, str(path)],
                stdout=subprocess.PIPE,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return json.loads(result.stdout)


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in rows[0] if name != "kind"]
    return {name: statistics.median(row[name] for row in rows) for name in names} | {
        "seconds_max": max(row["seconds"] for row in rows),
        "pause_max_s": max(row["pause_s"] for row in rows),
    }


# ------------------------------------------------------------------------------ the trainer's side


def trainer(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Publish from this process: first a full version, then deltas; a row for each."""
    import torch

    from kleash.client.weights import WeightsClient
    from kleash.lm.load import load_causal_lm
    from kleash.ppo.publish import Publisher
    from kleash.rpc.server import BackgroundServer
    from kleash.weights.store import Store
    from kleash.weights.store_service import StoreService

    torch.set_num_threads(1)
    model = load_causal_lm(Path(spec["model"]), dtype="float32")
    for parameter in model.parameters():  # a checkpoint is mapped, and resident once it is read
        parameter.data = parameter.data.clone()
    if not spec["is_known"]:
        _update(model, 1e-3, seed=0)  # so that no replica serves these weights
    rows = []
    with contextlib.ExitStack() as stack:
        store = Store(Path(spec["store"]))
        stack.callback(store.close)
        server = stack.enter_context(BackgroundServer([StoreService(store)]))
        clients = [
            stack.enter_context(contextlib.closing(WeightsClient(address)))
            for address, _ in spec["replicas"]
        ]
        publisher = Publisher(
            dict(enumerate(clients)),
            store,
            run_id="benchmark",
            fence=1,
            store_address=server.address,
        )
        if spec["is_generating"]:
            for address, _ in spec["replicas"]:
                stack.enter_context(_generating(address))
        everyone = [os.getpid(), *(it for _, it in spec["replicas"])]
        start = [memory(it)["VmRSS"] / MIB for it in everyone]
        for version in range(1, spec["deltas"] + 2):
            if version > 1:
                _update(model, UPDATE_STD, seed=version)
            rows.append(_publish(publisher, model, version, everyone, start))
            if version == 1:  # what was sent is an anchor, which no version of the run counts
                anchors = [it for it in store.versions() if not it.base_digest]
                rows[0]["bytes"] = sum(it.encoded_bytes for it in anchors)
    return rows


@contextlib.contextmanager
def _generating(address: str) -> Iterator[None]:
    """Keep a replica busy with 32 responses at a time until the end."""
    import numpy as np

    from kleash.client.policy import PolicyClient
    from kleash.client.types import Prompt, Sampling

    is_over, has_begun = threading.Event(), threading.Event()
    prompts = [Prompt(str(index), np.array([5, 6, 7], np.int32), 1) for index in range(32)]

    def work() -> None:
        with PolicyClient(address, checks_health=False) as policy:
            for seed in itertools.count():
                sampling = Sampling(seed, max_new_tokens=48, stop_token_ids=(0,))
                for _ in policy.generate(prompts, sampling):
                    has_begun.set()
                if is_over.is_set():
                    return

    thread = threading.Thread(target=work)
    thread.start()
    has_begun.wait(START_S)
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _publish(
    publisher: Any, model: Any, version: int, everyone: list[int], start: list[float]
) -> dict[str, Any]:
    """A row. ``everyone``: the trainer's process and the replicas'; ``start``: their first MiB."""
    before = [memory(it) for it in everyone]
    for process_id in everyone:
        reset_peak(process_id)
    anonymous = _PeakAnonymous(everyone)
    with anonymous:
        report = publisher.publish(model, version)
    after = [memory(it) for it in everyone]
    growth = [(now["VmHWM"] - then["VmRSS"]) / MIB for now, then in zip(after, before, strict=True)]
    own = [
        (peak - then["RssAnon"]) / MIB for peak, then in zip(anonymous.peaks, before, strict=True)
    ]
    shadow = report.dense_bytes / MIB if version == 1 else 0.0  # made by the first publication
    return {
        "kind": "full" if version == 1 else "delta",
        "seconds": report.seconds,
        "encode_s": report.encode_s,
        "pause_s": report.pause_s,
        "bytes": report.bytes,
        "dense_bytes": report.dense_bytes,
        "changed_fraction": report.changed_fraction,
        "trainer_above_start_mib": after[0]["VmHWM"] / MIB - start[0] - report.dense_bytes / MIB,
        "replica_above_start_mib": max(
            it["VmHWM"] / MIB - mib for it, mib in zip(after[1:], start[1:], strict=True)
        ),
        "trainer_excess_mib": growth[0] - shadow,
        "trainer_anonymous_mib": own[0] - shadow,
        "replica_excess_mib": max(growth[1:]),
        "replica_anonymous_mib": max(own[1:]),
    }


class _PeakAnonymous:
    """Samples memory that is not pages of files: those the kernel may drop."""

    def __init__(self, process_ids: list[int]) -> None:
        self._process_ids = process_ids
        self.peaks = [0] * len(process_ids)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while True:
            for index, process_id in enumerate(self._process_ids):
                self.peaks[index] = max(self.peaks[index], memory(process_id)["RssAnon"])
            if self._is_over.wait(0.005):
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def _update(model: Any, std: float, seed: int) -> None:
    """Add noise to every weight, a little at a time so that it leaves no mark on the memory."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.view(-1).split(1 << 14):
                piece.add_(torch.randn(piece.shape, generator=generator), alpha=std)


if __name__ == "__main__":
    began = time.monotonic()
    rows = trainer(json.loads(Path(sys.argv[1]).read_text()))
    print(f"{time.monotonic() - began:.1f} s", file=sys.stderr)
    print(json.dumps(rows))

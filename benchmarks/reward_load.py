"""The reward service under twice the load that it can bear, and while its replicas restart.

    python benchmarks/reward_load.py --json out.json     ten minutes of each, about 25 minutes
    python benchmarks/reward_load.py --quick             ten seconds of each, and starts of servers
    python benchmarks/reward_load.py overload            one part: overload, restart

overload: capacity is what callers that wait for each answer get. Then calls arrive at random times,
twice as many, each with a deadline, from two callers: one in four is a trainer's, which is served
first. Nobody retries, so that every refusal is seen. Health and memory are watched from outside.
restart: callers of the bundled client at two replicas, which are ended with SIGTERM and started
again in turn; every call must succeed.
The servers are ``kleash serve reward`` processes with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("overload", "restart")


def main() -> None:
    """Parse, run, print, write."""
    options = _parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    from environment import environment
    from reward_load_overload import overload
    from reward_load_restart import restart

    began = time.strftime("%H:%M:%S")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), options)
        if "overload" in options.parts:
            results["overload"] = overload(model, options)
        if "restart" in options.parts:
            results["restart"] = restart(model, options)
    summary = {
        f"{part}_{key}": value
        for part, its in results.items()
        for key, value in its["summary"].items()
    }
    print(json.dumps(summary, indent=2))
    if options.json:
        document = {
            "summary": summary,
            "options": vars(options) | {"json": str(options.json)},
            "environment": environment("grpcio", "torch", "transformers")
            | {"began": began, "ended": time.strftime("%H:%M:%S")},
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, help="overload, restart; default: both")
    parser.add_argument("--quick", action="store_true", help="ten seconds of each")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload, and of restarts")
    parser.add_argument("--factor", type=float, default=2.0, help="times the capacity")
    parser.add_argument("--deadline-s", type=float, default=4.0, help="of each call")
    parser.add_argument("--items", type=int, default=4, help="texts in one call")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part '{part}'; there are {', '.join(PARTS)}")
    options.seconds = 10.0 if options.quick else 60 * options.minutes
    return options


def write_model(folder: Path, options: argparse.Namespace) -> Path:
    """A reward model that computes for milliseconds."""
    from kleash.lm.heads import reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder
    from kleash.lm.tiny import write_tiny_folder

    size = (
        {"hidden_size": 128, "num_layers": 4}
        if options.quick
        else {"hidden_size": 256, "num_layers": 6}
    )
    base = write_tiny_folder(folder / "base", "llama", ["the quick brown fox"], **size)
    model = reward_model_from_causal_lm(base, seed=1)
    save_checkpoint_folder(model, load_tokenizer(base), folder / "reward", {"stage": "benchmark"})
    return folder / "reward"


class Server:
    """A ``kleash serve reward`` process on a port of its own."""

    def __init__(self, model: Path, port: int, metrics_port: int = 0, *flags: str) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self._command = [
            sys.executable,
            "-m",
            "kleash.cli",
            "serve",
            "reward",
            f"--model={model}",
            f"--server.port={port}",
            f"--server.metrics_port={metrics_port}",
            *flags,
        ]
        self.start()

    def start(self) -> None:
        """Start, and wait until it is ready."""
        from kleash.client.reward import RewardClient

        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        with RewardClient(self.address, timeout_s=120) as client:
            while self.process.poll() is None:
                try:
                    client.get_model()
                except Exception:  # not there yet
                    time.sleep(0.2)
                else:
                    return
        raise SystemExit(f"the server ended with status {self.process.returncode}")

    def stop(self) -> int:
        """End with SIGTERM; its status."""
        self.process.terminate()
        return self.process.wait()

    def rss_mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()

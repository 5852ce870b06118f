"""Pictures of the live view, taken from a real run: live-light.png, live-dark.png, watch.svg.

    python docs/live_pictures.py runs/demo docs/images

``runs/demo`` is a finished ``kleash demo``: its models and data are trained on once more, in a
folder that is thrown away, and the run is stopped when the pictures are taken.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, expect
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import launched, open_page  # noqa: E402

from kleash.cli.watch_state import RunView  # noqa: E402
from kleash.cli.watch_view import render  # noqa: E402
from kleash.client import TrainerClient, Unavailable  # noqa: E402
from kleash.up.supervisor import free_port, kleash_command  # noqa: E402

WIDTH = 100
"""Columns of the terminal."""
SIZE = (1360, 1300)
SETTLE_MS = 500
"""For the last events of the past to be drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of a finished kleash demo")
    parser.add_argument("images", type=Path, help="where the pictures go")
    parser.add_argument("--step", type=int, default=42, help="step at which they are taken")
    arguments = parser.parse_args()
    arguments.images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        take(arguments.demo, arguments.images, Path(folder), arguments.step)


def take(demo: Path, images: Path, folder: Path, step: int) -> None:
    """Run, wait for ``step``, take the pictures, stop."""
    port, http_port = free_port(), free_port()
    run = subprocess.Popen(_command(demo, folder, port, http_port), stdout=subprocess.DEVNULL)
    try:
        with TrainerClient(f"127.0.0.1:{port}") as client, launched() as browser:
            _wait_for(client, run, step)
            for scheme in ("light", "dark"):
                _take_page(browser, http_port, scheme, images / f"live-{scheme}.png")
            (images / "watch.svg").write_text(_terminal(client, port), encoding="utf-8")
            client.stop()
        run.wait(120)
    finally:
        run.terminate()
        run.wait()


def _command(demo: Path, folder: Path, port: int, http_port: int) -> list[str]:
    """``kleash up`` as the demo's last stage, with ports to watch it through."""
    made = json.loads((demo / "ppo" / "config.json").read_text(encoding="utf-8"))
    keep = ("total_steps", "batch_size", "max_prompt_tokens", "sampling", "algorithm", "kl")
    evaluation = made["evaluation"] | {"prompts": str(demo / "data" / "held-out.jsonl")}
    ppo = {name: made[name] for name in keep} | {
        "out": str(folder / "small-world"),
        "prompts": str(demo / "data" / "ppo-prompts.jsonl"),
        "model": str(demo / "sft"),
        "reward_model": str(demo / "reward-model"),
        "policy": {"learning_rate": made["policy"]["learning_rate"]},
        "value": {"learning_rate": made["value"]["learning_rate"]},
        "evaluation": evaluation,
        "num_threads": 1,
        "server": {"port": port, "http_port": http_port},
    }
    limits = {"limits": {"max_batch_tokens": 4096}}
    config = {"ppo": ppo, "reward": limits, "reference": limits, "service_threads": 1}
    path = folder / "up.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return kleash_command("up", str(path))


def _wait_for(client: TrainerClient, run: subprocess.Popen[bytes], step: int) -> None:
    while True:
        if run.poll() is not None:
            raise SystemExit(f"kleash up ended with status {run.returncode}")
        try:
            if client.get_run().step >= step:
                return
        except Unavailable:
            pass
        time.sleep(1.0)


def _take_page(browser: Browser, port: int, scheme: str, path: Path) -> None:
    address = f"http://127.0.0.1:{port}/"
    with open_page(browser, address, size=SIZE, color_scheme=scheme) as page:
        expect(page.locator(".sample").first).to_be_visible()
        expect(page.locator("path.smooth").first).to_be_attached()
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=path)


def _terminal(client: TrainerClient, port: int) -> str:
    """The picture of ``kleash watch``, as SVG without fonts from elsewhere."""
    view = RunView()
    view.take_run(client.get_run())
    for metrics in client.watch_steps(from_step=1):
        view.take_step(metrics)
        if metrics.step >= view.run.step:
            break
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    picture = render(view, width=WIDTH, place=f"127.0.0.1:{port}", notice="", has_keys=True)
    console.print(picture)
    svg = console.export_svg(title="kleash watch", theme=DIMMED_MONOKAI, unique_id="watch")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono'")


if __name__ == "__main__":
    main()

"""Pictures of the run report, of real runs: report-light.png, report-dark.png and two of its parts.

    python docs/report_pictures.py runs/demo docs/images

``runs/demo`` is a finished ``kleash demo``: its models and data are trained on once more, with two
leashes and three seeds each, some minutes in all. ``--runs=FOLDER`` keeps those runs, and takes the
ones that are there and complete.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import launched, open_page  # noqa: E402

from kleash.up.supervisor import kleash_command  # noqa: E402

SIZE = (1360, 1180)
TITLE = "Two leashes on the small world"
COEFFICIENTS = (0.1, 0.01)
SEEDS = (0, 1, 2)
TOKEN = 6
"""Of the first response; its figures are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of a finished kleash demo")
    parser.add_argument("images", type=Path, help="where the pictures go")
    parser.add_argument("--runs", type=Path, help="where the runs are, or go; thrown away without")
    arguments = parser.parse_args()
    arguments.images.mkdir(parents=True, exist_ok=True)
    with _folder(arguments.runs) as folder:
        runs = [_run(arguments.demo, folder, beta, seed) for beta in COEFFICIENTS for seed in SEEDS]
        page = folder / "report.html"
        names = map(str, runs)
        command = kleash_command("report", *names, f"--out={page}", f"--title={TITLE}")
        subprocess.run(command, check=True)
        take(page, arguments.images)


def take(page: Path, images: Path) -> None:
    """The top of the page in both themes, the curves and the samples."""
    with launched() as browser:
        for scheme in ("light", "dark"):
            with open_page(browser, page.as_uri(), size=SIZE, color_scheme=scheme) as its:
                its.screenshot(path=images / f"report-{scheme}.png")
        options = {"reduced_motion": "reduce"}
        with open_page(browser, page.as_uri(), size=SIZE, color_scheme="light", **options) as its:
            _show(its, "curves")
            its.locator("#chart-kl_per_sequence .chart").hover()
            its.screenshot(path=images / "report-curves.png")
        size = (SIZE[0], 760)
        with open_page(browser, page.as_uri(), size=size, color_scheme="dark", **options) as its:
            _show(its, "samples")
            its.locator(".sample").first.locator(".token").nth(TOKEN).hover()
            its.screenshot(path=images / "report-samples.png")


def _show(page: Page, section: str) -> None:
    page.locator(f"#{section}").evaluate("section => section.scrollIntoView()")


@contextlib.contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def _run(demo: Path, folder: Path, beta: float, seed: int) -> Path:
    """``kleash up`` as the demo's last stage, shorter and with another leash; its run folder."""
    out = folder / f"beta-{beta}-seed-{seed}"
    if (out / "report.json").exists():
        return out
    made = json.loads((demo / "ppo" / "config.json").read_text(encoding="utf-8"))
    ppo = {
        "out": str(out),
        "run_id": out.name,
        "resume": True,
        "seed": seed,
        "prompts": str(demo / "data" / "ppo-prompts.jsonl"),
        "model": str(demo / "sft"),
        "reward_model": str(demo / "reward-model"),
        "total_steps": 40,
        "batch_size": 64,
        "max_prompt_tokens": made["max_prompt_tokens"],
        "sampling": {"max_new_tokens": made["sampling"]["max_new_tokens"]},
        "algorithm": {"epochs": 2, "minibatches": 2},
        "kl": {"coefficient": beta},
        "policy": {"learning_rate": 4e-4},
        "value": {"learning_rate": 1e-3},
        "evaluation": {
            "prompts": str(demo / "data" / "held-out.jsonl"),
            "every": 5,
            "num_prompts": 100,
            "judge": made["evaluation"]["judge"],
        },
        "checkpoint": {"every": 20},
        "num_threads": 1,
    }
    path = folder / f"{out.name}.json"
    path.write_text(json.dumps({"ppo": ppo, "service_threads": 1}), encoding="utf-8")
    subprocess.run(kleash_command("up", str(path)), check=True)
    return out


if __name__ == "__main__":
    main()

"""Draws the trace of a PPO step from a run that it makes: tiny models, four processes.

python -m tests.trace_picture docs/images/trace-step.png     `make trace-picture`; a minute
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.observed_run import tiny_models

from kleash.up.supervisor import kleash_command

STEP = 3
"""The first ones find cold services."""


def main(picture: Path) -> None:
    """Run, and draw one step."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        models = tiny_models(root)
        prompts = root / "prompts.jsonl"
        lines = [json.dumps({"prompt": f"What is {n} plus 4?"}) for n in range(32)]
        prompts.write_text("\n".join(lines) + "\n")
        run = root / "run"
        up = [
            "up",
            f"--ppo.model={models.policy}",
            f"--ppo.reward_model={models.reward}",
            f"--ppo.prompts={prompts}",
            f"--ppo.out={run}",
            f"--ppo.total_steps={STEP}",
            "--ppo.tracing.exporter=file",
            "--ppo.batch_size=32",
            "--ppo.services.group_size=4",
            "--ppo.sampling.max_new_tokens=48",
            "--ppo.max_prompt_tokens=64",
            "--policy.max_running_sequences=6",
            "--ppo.algorithm.epochs=2",
            "--ppo.num_threads=1",
            "--service_threads=1",
        ]
        subprocess.run(kleash_command(*up), check=True)
        picture.parent.mkdir(parents=True, exist_ok=True)
        show = ["trace", str(run), f"--step={STEP}", f"--picture={picture}"]
        subprocess.run(kleash_command(*show), check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

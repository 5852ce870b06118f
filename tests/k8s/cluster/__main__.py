"""The life of a deployment on a real cluster, one line for each thing that happens to it.

    KUBECONFIG=... python -m tests.k8s.cluster --set image.repository=registry:5000/kleash

Needs kubectl, helm, and the image where the nodes find it. Makes a namespace of its own, with Pod
Security ``restricted`` enforced, and removes it at the end unless --keep is given. Exit status 1
when a line says FAIL.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from pathlib import Path

from tests.k8s.cluster.kube import Kube, ScenarioError, run
from tests.k8s.cluster.scenarios import SCENARIOS, Situation, SkippedError

CHART = Path(__file__).parents[3] / "k8s" / "chart"


def main() -> int:
    options = _options()
    if not os.environ.get("KUBECONFIG"):
        sys.stderr.write("error: set KUBECONFIG to the cluster that is to be used.\n")
        return 2
    namespace = options.namespace or f"kleash-test-{secrets.token_hex(3)}"
    values = [part for each in options.set for part in ("--set", each)]
    values += [part for each in options.values for part in ("--values", each)]
    at = Situation(
        kube=Kube(namespace, options.release, options.release),
        chart=CHART,
        helm_values=[*values, "--set", f"trainer.config.total_steps={options.steps}"],
        run_id=options.release,
        budget_s=options.budget_s,
        cut=options.cut,
        heal=options.heal,
        reboot=options.reboot,
    )
    names = options.only or list(SCENARIOS)
    failed = False
    try:
        for name in names:
            failed |= not _report(name, at)
            if failed and name == "install":
                break
    finally:
        if not options.keep:
            run(["kubectl", "delete", "namespace", namespace, "--ignore-not-found"], None, 600)
    return int(failed)


def _report(name: str, at: Situation) -> bool:
    began = time.monotonic()
    try:
        verdict, seen = "PASS", SCENARIOS[name](at)
    except SkippedError as reason:
        verdict, seen = "SKIP", str(reason)
    except ScenarioError as error:
        verdict, seen = "FAIL", str(error)
    sys.stdout.write(f"{verdict} {name} ({time.monotonic() - began:.0f} s): {seen}\n")
    sys.stdout.flush()
    return verdict != "FAIL"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.k8s.cluster", description=__doc__)
    parser.add_argument("--release", default="kleash", help='contains "kleash"')
    parser.add_argument("--namespace", help="default: a new one with a random name")
    parser.add_argument("--set", action="append", default=[], help="for helm, as KEY=VALUE")
    parser.add_argument("--values", action="append", default=[], help="for helm, a file")
    parser.add_argument("--steps", type=int, default=400, help="PPO steps of the whole run")
    parser.add_argument("--budget_s", type=float, default=300, help="until the first PPO step")
    parser.add_argument("--cut", default="", help="shell: drop packets $TRAINER_IP - $POLICY_IP")
    parser.add_argument("--heal", default="", help="shell: undo --cut")
    parser.add_argument("--reboot", default="", help="shell: restart the node")
    parser.add_argument("--keep", action="store_true", help="leave the namespace")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), help="these, in this order")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

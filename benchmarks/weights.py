"""Publication of weights: size and speed of deltas, time and pause of a fleet, memory.

    python benchmarks/weights.py --json out.json            everything, about nine minutes
    python benchmarks/weights.py --quick                    small models, under 45 s
    python benchmarks/weights.py deltas                     codecs side by side on real deltas
    python benchmarks/weights.py fleet                      replicas as processes, and their memory

deltas: of a PPO run, and of AdamW steps of a larger model; every codec on the same bytes, one
thread, CPU time, bit-exact. ARC (arc_v2, arc_v3) is measured when fireworks-delta-compression and
zstd are installed (pip install fireworks-delta-compression==0.1.0).
fleet: from the end of the update to "all replicas serve the version", for a full version (a replica
whose weights are unknown) and for deltas; the share of a PPO step that the pause takes, with the
step from ppo_step.py run in the same session.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PARTS = ("deltas", "fleet")
PACKAGES = ("torch", "numpy", "zstandard", "grpcio", "fireworks-delta-compression")
ABOUT = 0.03
"""Changed fraction at which codecs are compared in the summary."""


def main() -> None:
    """Parse, run, print, write."""
    from environment import environment

    options = _parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    results: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "deltas" in options.parts:
            results["deltas"] = _deltas(options, Path(folder))
            summary |= _summarize_deltas(results["deltas"])
        if "fleet" in options.parts:
            results["step"] = _step(options, Path(folder))
            results["fleet"] = _fleet(options, Path(folder))
            summary |= _summarize_fleet(results["fleet"], results["step"]["step_s"])
    print(json.dumps(summary, indent=2))
    if options.json:
        document = {
            "summary": summary,
            "options": vars(options) | {"json": str(options.json)},
            "environment": environment(*PACKAGES),
            "results": results,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, help="deltas, fleet; default: both")
    parser.add_argument("--quick", action="store_true", help="small models: under 45 s")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"unknown part '{part}'; there are {', '.join(PARTS)}")
    options.rounds = 1 if options.quick else 3
    return options


# ---------------------------------------------------------------------------------------- deltas


def _deltas(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    import weights_codecs as codecs
    from weights_deltas import Delta, adamw_deltas, ppo_deltas, statistics

    rows: list[dict[str, Any]] = []

    def measure(delta: Delta, pairs: Any, served: str, layouts: list[codecs.Layout]) -> None:
        rounds = options.rounds if served == "bf16" else 1
        row: dict[str, Any] = {"name": f"{delta.name}, {served}", "codecs": {}}
        row |= statistics(delta) if served == "bf16" else {}
        gib = sum(new.nbytes for _, new in pairs) / codecs.GIB
        row["find_gib_per_s"] = gib / codecs.find_seconds(pairs, rounds)
        digest_s = codecs.digest_seconds(pairs, rounds)
        for layout in layouts:
            row["codecs"][layout.name] = codecs.measure(layout, pairs, rounds)
        encode_s = gib / row["codecs"]["kleash"]["encode_gib_per_s"]
        row["encode_gib_per_s_without_digest"] = gib / max(encode_s - digest_s, 1e-9)
        rows.append(row)
        _print_delta(row)

    found = codecs.layouts()
    for delta in ppo_deltas(options, folder):
        measure(delta, delta.words, "bf16", found)
    larger = adamw_deltas(options)
    for delta in larger:
        measure(delta, delta.words, "bf16", found)
    measure(larger[0], larger[0].master_words, "fp32", [it for it in found if "arc" not in it.name])
    return rows


def _print_delta(row: dict[str, Any]) -> None:
    print(f"\n{row['name']}")
    if "elements" in row:
        print(
            f"  {row['elements']:,} elements; changed {row['changed_fraction']:.3%}, predicted "
            f"{row['predicted_fraction']:.3%}; by one ULP {row['one_ulp_share']:.1%}"
        )
    print(f"  {'':<28}{'ratio':>8}{'bit/changed':>13}{'encode':>9}{'apply':>9}  GiB/s dense/core")
    for name, it in row["codecs"].items():
        print(
            f"  {name:<28}{it['ratio']:>8.1f}{it['bits_per_changed']:>13.2f}"
            f"{it['encode_gib_per_s']:>9.2f}{it['apply_gib_per_s']:>9.2f}"
        )
    print(
        f"  kleash without the digest's update: encode {row['encode_gib_per_s_without_digest']:.2f}"
        f"; numpy.flatnonzero(old != new) alone: {row['find_gib_per_s']:.2f}"
    )


def _summarize_deltas(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the larger model's delta that is nearest to ``ABOUT``."""
    larger = [row for row in rows if row["name"].startswith("AdamW") and "elements" in row]
    row = min(larger, key=lambda it: abs(it["changed_fraction"] - ABOUT))
    own, xor = row["codecs"]["kleash"], row["codecs"]["XOR of all + zstd-1"]
    return {
        "delta": row["name"],
        "changed_fraction": round(row["changed_fraction"], 5),
        "compression_ratio": round(own["ratio"], 2),
        "encode_gib_per_s_per_core": round(own["encode_gib_per_s"], 3),
        "apply_gib_per_s_per_core": round(own["apply_gib_per_s"], 3),
        "ratio_vs_xor_zstd": round(own["ratio"] / xor["ratio"], 3),
    }


# ----------------------------------------------------------------------------------------- fleet


def _step(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The demo's PPO step, measured by ppo_step.py now."""
    out = folder / "step.json"
    short = ["--services=local", "--steps=1"] if options.quick else ["--steps=6"]
    subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("ppo_step.py")),
            f"--json={out}",
            f"--threads={options.threads}",
            "--epochs=2",
            "--intermediate=256",
            *short,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(out.read_text())["summary"]


def _fleet(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """By model and number of replicas; memory is the larger model's, if there is one."""
    from weights_deltas import demo_model
    from weights_fleet import delta_memory, larger_model, publish_rounds

    rounds, counts = (1, (1,)) if options.quick else (2, (1, 2, 4))
    models = {"demo, F32": (demo_model(folder / "demo"), "float32")}
    if not options.quick:
        models["larger, BF16"] = (larger_model(folder / "larger"), "bfloat16")
    models["demo, F32, generating"] = models["demo, F32"]
    rows: dict[str, dict[str, Any]] = {}
    for name, (model, dtype) in models.items():
        is_generating = name.endswith("generating")
        print(f"\n{name}, median of {rounds} full and {4 * rounds} delta publications")
        print(
            f"  {'replicas':<10}{'':<7}{'MiB sent':>9}{'of':>8}{'encode ms':>11}{'all ms':>9}"
            f"{'pause ms':>10}{'trainer':>9}{'replica':>9}  excess MiB RSS (not files)"
        )
        rows[name] = {}
        for count in counts:
            rows[name][str(count)] = found = publish_rounds(
                model, count, dtype, rounds, is_generating=is_generating
            )
            for kind, it in found.items():
                print(
                    f"  {count:<10}{kind:<7}{it['bytes'] / 2**20:>9.2f}"
                    f"{it['dense_bytes'] / 2**20:>8.1f}{it['encode_s'] * 1e3:>11.1f}"
                    f"{it['seconds'] * 1e3:>9.1f}{it['pause_s'] * 1e3:>10.2f}"
                    f"{it['trainer_excess_mib']:>9.1f}{it['replica_excess_mib']:>9.1f}"
                    f"  ({it['trainer_anonymous_mib']:.1f}, {it['replica_anonymous_mib']:.1f})"
                )
        if options.quick or is_generating:  # it takes processes of its own
            continue
        rows[name]["delta_memory_mib"] = alone = delta_memory(model, dtype)
        print(
            f"  deltas alone, peak over model and shadow: trainer {alone['trainer']:.1f} MiB, over "
            f"the model: replica {alone['replica']:.1f} MiB"
        )
    return rows


def _summarize_fleet(fleet: dict[str, dict[str, Any]], step_s: float) -> dict[str, Any]:
    demo, busy = fleet["demo, F32"], fleet["demo, F32, generating"]
    larger = fleet.get("larger, BF16", demo)
    one = larger["1"]
    excess = {
        "trainer_full": one["full"]["trainer_excess_mib"],
        "replica_full": one["full"]["replica_excess_mib"],
    }
    if "delta_memory_mib" in larger:
        alone = larger["delta_memory_mib"]
        excess |= {"trainer": alone["trainer"], "replica_delta": alone["replica"]}
    return {
        "publish_s": _seconds(demo),
        "publish_larger_s": _seconds(larger),
        "step_s": round(step_s, 3),
        "pause_frac_of_step": round(demo["1"]["delta"]["pause_s"] / step_s, 5),
        "pause_frac_of_step_generating": {
            count: round(row["delta"]["pause_s"] / step_s, 5) for count, row in busy.items()
        },
        "rss_excess_mib": {name: round(value, 1) for name, value in excess.items()},
    }


def _seconds(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        kind: {
            count: round(row[kind]["seconds"], 4) for count, row in rows.items() if count.isdigit()
        }
        for kind in ("full", "delta")
    }


if __name__ == "__main__":
    main()

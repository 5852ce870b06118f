"""Share of a PPO step that its metrics cost: every counter, gauge and histogram of all processes.

    python benchmarks/instrumentation.py         the demo's size, three minutes where it is quiet
    python benchmarks/instrumentation.py --quick --json out.json

Trainer and services are in this process, over gRPC on loopback and with the clients' metrics on, so
that all calls into prometheus_client can be seen. Two ways:

counted      Calls into prometheus_client in a step, times what one call costs, measured alone, plus
             a scrape every --scrape-s; over the median step. What leads to a call, such as reading
             a clock, is not in it.
alternated   Every other step runs with the methods replaced by empty ones; the median over pairs of
             neighbours of with / without. All is in it, within the noise of the machine: the same
             among steps without is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from environment import environment
from ppo_step import make_models, write_prompts

METHODS = (
    ("Counter", "inc"),
    ("Gauge", "inc"),
    ("Gauge", "set"),
    ("Histogram", "observe"),
    ("MetricWrapperBase", "labels"),
)
"""What Kleash calls of prometheus_client; Gauge.set_to_current_time calls set."""
NUM_CALLS, ROUNDS = 20_000, 5


def main() -> None:
    """Parse, run, print, write."""
    options = _parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    costs_s = _costs_s()
    metrics = _Metrics()
    with tempfile.TemporaryDirectory() as folder:
        seconds, calls = _run(options, Path(folder), metrics)
        scrape_s = _scrape_s()
    with_s, without_s = seconds[0::2], seconds[1::2]
    step_s = statistics.median(with_s)
    per_step = {name: count / len(with_s) for name, count in calls.items()}
    counted_s = sum(per_step[name] * costs_s[name] for name in per_step)
    summary = {
        "step_s": round(step_s, 4),
        "calls_per_step": round(sum(per_step.values())),
        "counted_frac": round(counted_s / step_s + scrape_s / options.scrape_s, 6),
        "with_over_without": round(_median_ratio(with_s, without_s), 4),
        "without_over_without": round(_median_ratio(without_s[1:], without_s), 4),
        "scrape_s": round(scrape_s, 5),
    }
    print(f"{'call':<26}{'a step':>10}{'us each':>10}{'share':>10}")
    for name, count in sorted(per_step.items()):
        share = count * costs_s[name] / step_s
        print(f"{name:<26}{count:>10.0f}{costs_s[name] * 1e6:>10.2f}{share:>10.4%}")
    print(
        f"step {step_s:.3f} s; counted {summary['counted_frac']:.4%} of it, a scrape of "
        f"{scrape_s * 1e3:.1f} ms every {options.scrape_s:g} s included; steps with / without "
        f"metrics {summary['with_over_without']}, two steps without "
        f"{summary['without_over_without']}, over {len(with_s)} pairs"
    )
    if options.json:
        record = {
            "summary": summary,
            "options": vars(options) | {"json": str(options.json)},
            "environment": environment("torch", "grpcio", "prometheus-client"),
            "calls_per_step": per_step,
            "cost_us": {name: cost * 1e6 for name, cost in costs_s.items()},
            "with_s": with_s,
            "without_s": without_s,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model, few steps: under 45 s")
    parser.add_argument(
        "--json", type=Path, help="write summary, options, environment and every step to this file"
    )
    parser.add_argument("--pairs", type=int, default=20, help="of a step with and one without")
    parser.add_argument("--scrape-s", type=float, default=15.0, help="between two scrapes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.set_defaults(kind="llama", hidden=96, layers=3, heads=4, intermediate=0, vocab=512)
    parser.set_defaults(batch=128, prompt_tokens=32, response_tokens=24)
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.layers, options.batch, options.pairs = 64, 2, 32, 4
    return options


class _Metrics:
    """The methods of METHODS: counted, or empty."""

    def __init__(self) -> None:
        import prometheus_client.metrics

        self._classes = {name: getattr(prometheus_client.metrics, name) for name, _ in METHODS}
        self._own = {each: getattr(self._classes[each[0]], each[1]) for each in METHODS}
        self.calls: Counts[str] = Counts()

    def count(self) -> None:
        """Note each call and make it."""
        for owner, name in METHODS:
            self._put(owner, name, self._counting(f"{owner}.{name}", self._own[owner, name]))

    def silence(self) -> None:
        """Make none."""
        for owner, name in METHODS:
            self._put(owner, name, _self if name == "labels" else _nothing)

    def restore(self) -> None:
        """Make them as if this were not here."""
        for (owner, name), method in self._own.items():
            self._put(owner, name, method)

    def _counting(self, label: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **keywords: Any) -> Any:
            self.calls[label] += 1
            return method(*arguments, **keywords)

        return counting

    def _put(self, owner: str, name: str, method: Callable[..., Any]) -> None:
        setattr(self._classes[owner], name, method)


def _self(metric: Any, *_arguments: Any, **_keywords: Any) -> Any:
    return metric


def _nothing(*_arguments: Any, **_keywords: Any) -> None:
    return


def _run(
    options: argparse.Namespace, folder: Path, metrics: _Metrics
) -> tuple[list[float], Counts[str]]:
    """Seconds of each step, with metrics and without in turn; calls of those with."""
    import torch

    from kleash.ppo.config import PPOConfig
    from kleash.ppo.control import Control
    from kleash.ppo.train import train

    torch.set_num_threads(options.threads)
    model, reward = make_models(options, folder)
    write_prompts(options, folder / "prompts.jsonl")
    # Two steps warm up; then pairs whose calls are counted, and as many whose seconds are.
    num_steps = 2 + 4 * options.pairs
    control, ends = Control(), [time.perf_counter()]

    def step_ended() -> None:
        if len(control.steps) == len(ends) - 1:
            return
        ends.append(time.perf_counter())
        done = len(control.steps) - 2
        if done < 0:
            return
        if done % 2:
            metrics.silence()
        elif done < 2 * options.pairs:
            metrics.count()
        else:
            metrics.restore()

    control.add_listener(step_ended)
    with _services(model, reward) as addresses:
        config = PPOConfig.model_validate(
            {
                "out": folder / "run",
                "prompts": str(folder / "prompts.jsonl"),
                "model": model,
                "reward_model": reward,
                "total_steps": num_steps,
                "batch_size": options.batch,
                "max_prompt_tokens": options.prompt_tokens,
                "sampling": {"max_new_tokens": options.response_tokens},
                "algorithm": {"epochs": 4, "minibatches": 2},
                "checkpoint": {"every": num_steps},
                "services": addresses,
            }
        )
        try:
            _train(config, control, train)
        finally:
            metrics.restore()
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    return seconds[2 + 2 * options.pairs :], metrics.calls


def _train(config: Any, control: Any, train: Callable[..., Any]) -> None:
    from kleash.client import metrics
    from kleash.ppo.services import connect

    metrics.enable()
    with connect(config.services) as services:
        train(config, services, control=control)


@contextlib.contextmanager
def _services(model: Path, reward: Path) -> Iterator[dict[str, Any]]:
    """Addresses of the three services, in this process."""
    from kleash.policy.config import PolicyConfig
    from kleash.policy.service import PolicyService
    from kleash.reference.config import ReferenceConfig
    from kleash.reference.service import ReferenceService
    from kleash.reward.config import RewardConfig
    from kleash.reward.service import RewardService
    from kleash.rpc.server import BackgroundServer

    hosted = (
        PolicyService(PolicyConfig(model=model)),
        RewardService(RewardConfig(model=reward)),
        ReferenceService(ReferenceConfig(model=model)),
    )
    with BackgroundServer(hosted) as server:
        yield {"policy": [server.address], "reward": server.address, "reference": server.address}


def _costs_s() -> dict[str, float]:
    """Of one call of each method, the best of some rounds."""
    import prometheus_client

    own = prometheus_client.CollectorRegistry()
    labels = ("grpc_type", "grpc_service", "grpc_method", "grpc_code")
    values = ("unary", "kleash.reward.v1.RewardService", "Score", "OK")
    counter = prometheus_client.Counter("a", "a", labels, registry=own)
    gauge = prometheus_client.Gauge("b", "b", labels, registry=own).labels(*values)
    histogram = prometheus_client.Histogram(
        "c", "c", labels, registry=own, buckets=[2**k for k in range(14)]
    ).labels(*values)
    child = counter.labels(*values)
    calls: dict[str, Callable[[], Any]] = {
        "Counter.inc": child.inc,
        "Gauge.inc": gauge.inc,
        "Gauge.set": lambda: gauge.set(1.0),
        "Histogram.observe": lambda: histogram.observe(100.0),
        "MetricWrapperBase.labels": lambda: counter.labels(*values),
    }
    return {name: min(_seconds_each(call) for _ in range(ROUNDS)) for name, call in calls.items()}


def _seconds_each(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    return (time.perf_counter() - began) / NUM_CALLS


def _scrape_s() -> float:
    """To write the page with all series of the run, median."""
    import prometheus_client

    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        prometheus_client.generate_latest()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _median_ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=False))


if __name__ == "__main__":
    main()

"""``kleash replay``: a recorded PPO step again, as it was or with another reward model."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kleash.base.errors import ConfigError
from kleash.cli.flags import Parser, parse_or_help
from kleash.cli.options import limit_threads
from kleash.cli.output import show

if TYPE_CHECKING:
    from kleash.ppo.recorder import Recording
    from kleash.ppo.replay import Difference, Replay
    from kleash.ppo.services import Reward

NUM_RESPONSES = 5
"""Responses that are shown, those whose scores have changed most."""
MOST_LETTERS = 160


def run(arguments: Sequence[str]) -> int:
    """Replay a step. The status is 1 when its figures are not those that were recorded."""
    flags = parse_or_help(_parser(), arguments)
    if flags is None:
        return 0
    if flags.reward and flags.reward_model:
        raise ConfigError("--reward and --reward_model both name another reward model; take one.")
    if flags.json and not flags.json.parent.is_dir():
        raise ConfigError(f"--json: {flags.json.parent} is no folder; make it, or name another.")
    from kleash.ppo.recorder import open_recording

    recording = open_recording(flags.run, flags.step)
    limit_threads(recording.described["environment"]["machine"]["threads"])
    return _run(recording, flags)


def _run(recording: Recording, flags: argparse.Namespace) -> int:
    from kleash.ppo.replay import differences, different, different_surroundings, replay

    show(
        f"step {recording.step} of run {recording.described['run_id']}, policy version "
        f"{recording.described['weights_version']}, {len(recording.described['prompts'])} responses"
    )
    again = replay(recording, device=flags.device)
    changed = differences(recording, again)
    models = [
        name for name, digest in recording.described["after"].items() if again.after[name] != digest
    ]
    document: dict[str, Any] = {
        "step": recording.step,
        "run_id": recording.described["run_id"],
        "is_identical": not changed and not models,
        "differences": [asdict(each) for each in changed],
        "models_that_differ": models,
    }
    if not changed and not models:
        show(
            f"replayed: all {len(again.figures)} figures and the digests of both models after the "
            "update are those of the run"
        )
    else:
        for why in different_surroundings(recording, device=flags.device):
            show(f"  not as it was: {why}")
        show(
            f"replayed: {len(changed)} of {len(again.figures)} figures differ"
            + "".join(f", the {name} model differs" for name in models)
        )
        _show_figures(changed, ("recorded", "replayed"))
    if flags.reward or flags.reward_model:
        with _other_reward(flags) as reward:
            other = replay(recording, reward=reward, device=flags.device)
        document["other_reward_model"] = _show_other(
            again, other, different(again.figures, other.figures)
        )
    if flags.json:
        flags.json.write_text(
            json.dumps(_json_value(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    return 0 if document["is_identical"] else 1


@contextlib.contextmanager
def _other_reward(flags: argparse.Namespace) -> Iterator[Reward]:
    """A service, or a model in this process."""
    if flags.reward:
        from kleash.client.reward import RewardClient

        with RewardClient.from_env(address=flags.reward, timeout_s=flags.timeout_s) as client:
            yield client
        return
    from kleash.reward.config import RewardConfig
    from kleash.reward.local import LocalReward

    with contextlib.closing(LocalReward.load(RewardConfig(model=flags.reward_model))) as local:
        yield local


def _show_other(again: Replay, other: Replay, changed: list[Difference]) -> dict[str, Any]:
    from kleash.ppo.replay_scores import compare_scores

    pairs = [
        (one.uncalibrated_score, two.uncalibrated_score)
        for one, two in zip(again.samples, other.samples, strict=True)
    ]
    compared = compare_scores(*zip(*pairs, strict=True))
    agreement = "no pair" if compared.pair_agreement is None else f"{compared.pair_agreement:.1%}"
    show(
        f"\nwith reward model {other.samples[0].reward_revision} instead of "
        f"{again.samples[0].reward_revision}:\n"
        f"  scores: mean {compared.mean[0]:.4g} -> {compared.mean[1]:.4g}, standard deviation "
        f"{compared.standard_deviation[0]:.4g} -> {compared.standard_deviation[1]:.4g}\n"
        f"  correlation {compared.correlation:.3f}, of ranks {compared.rank_correlation:.3f}; the "
        f"same order in {agreement} of the pairs"
    )
    _show_figures(changed, ("this model", "the other"))
    rows = sorted(
        zip(again.samples, again.responses, pairs, strict=True),
        key=lambda row: -abs(row[2][1] - row[2][0]),
    )
    responses = [
        {"prompt_id": sample.record.prompt_id, "response": text, "score": one, "other_score": two}
        for sample, text, (one, two) in rows
    ]
    show("  responses whose scores changed most:")
    for row in responses[:NUM_RESPONSES]:
        text = row["response"].replace("\n", " ")
        text = text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + "..."
        show(f"  {row['score']:+9.4f} {row['other_score']:+9.4f}  {row['prompt_id']}: {text}")
    return {
        "revision": other.samples[0].reward_revision,
        "scores": asdict(compared),
        "figures": [asdict(each) for each in changed],
        "responses": responses,
    }


def _show_figures(changed: Sequence[Difference], names: tuple[str, str]) -> None:
    if not changed:
        return
    width = max(len(each.name) for each in changed)
    show(f"  {'':{width}} {names[0]:>14} {names[1]:>14}     difference")
    for each in changed:
        both = each.recorded is not None and each.replayed is not None
        difference = each.replayed - each.recorded if both else math.nan  # type: ignore[operator]
        show(
            f"  {each.name:{width}} {_number(each.recorded):>14} {_number(each.replayed):>14} "
            + (f"{difference:>+14.4g}" if both else f"{'':>14}")
        )


def _json_value(value: Any) -> Any:
    """``value`` with "nan", "inf" and "-inf" for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.8g}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kleash replay",
        description=(
            "A PPO step that was recorded (kleash ppo --record.every=N), done again from the "
            "recorded requests and replies: on a CPU bit for bit, or with another reward model, "
            "and what is different then. Needs no service but that one. The status is 1 when "
            "figures or models are not those that were recorded."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="--out folder of a PPO run, or one of its recordings")
    add("--step", metavar="N", type=int, help="the newest that is recorded, without it")
    add("--reward", metavar="HOST:PORT", help="a reward service that scores the responses instead")
    help_ = "a reward model that scores them instead, in this process"
    add("--reward_model", metavar="FOLDER", type=Path, help=help_)
    help_ = "the torch device to compute on, such as cpu; the run's, without it"
    add("--device", metavar="NAME", help=help_)
    help_ = "seconds that a call to --reward may take; 120 without it"
    add("--timeout_s", metavar="N", type=float, default=120.0, help=help_)
    add("--json", metavar="FILE", type=Path, help="write what was found, with all responses")
    return parser

"""``kleash watch``: a PPO run as it goes, in a terminal or as lines, told by its trainer."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from google.protobuf import json_format

from kleash.base.errors import ConfigError, KleashError
from kleash.cli.flags import Parser, parse_or_help
from kleash.cli.output import show
from kleash.cli.trainer_target import HELP, Target, check_run, connected, find_trainer
from kleash.cli.watch_feed import Back, Lost, News, StartedAgain, follow
from kleash.cli.watch_state import MAX_STEPS, RunView, describe_state, duration
from kleash.client.trainer import TrainerClient
from kleash.trainer.v1 import trainer_pb2

KEY_WAIT_S = 0.2
FAILED = 1


def run(arguments: Sequence[str]) -> int:
    """Watch until the run is over, or the reader leaves. Returns 1 for a run that has failed."""
    flags = parse_or_help(_parser(), arguments)
    if flags is None:
        return 0
    if flags.wait_s < 0:
        raise ConfigError(f"--wait_s={flags.wait_s:g} is below 0.")
    target = find_trainer(flags.target)
    with connected(target) as client:
        first = flags.from_step
        is_plain = flags.plain or flags.json or not sys.stdout.isatty()
        if first is None:
            done = client.get_run().step
            first = done + 1 if is_plain else max(1, done - MAX_STEPS + 1)
        news = follow(
            client,
            from_step=first,
            wait_s=flags.wait_s,
            check=lambda run_id: check_run(target, run_id),
        )
        if is_plain:
            view = _watch_lines(news, _json_line if flags.json else _plain_line)
        else:
            view = _Screen(client, target, news).watch()
    if view is None:
        return 0
    return FAILED if view.run.state == trainer_pb2.RUN_STATE_FAILED else 0


# -------------------------------------------------------------------------------------------- lines


def _watch_lines(news: Iterator[News], line_of: Callable[[RunView, News | None], str]) -> RunView:
    view = RunView()
    for each in news:
        before = view.state
        _take(view, each)
        is_known = isinstance(each, trainer_pb2.GetRunResponse) and view.state == before
        if line := "" if is_known and line_of is _plain_line else line_of(view, each):
            show(line)
    view.is_over = True
    show(line_of(view, None))
    return view


def _take(view: RunView, news: News) -> None:
    match news:
        case trainer_pb2.GetRunResponse():
            view.take_run(news)
        case trainer_pb2.StepMetrics():
            view.take_step(news)
        case StartedAgain(step):
            view.cut_back(step)
        case Lost() | Back():
            view.is_away = isinstance(news, Lost)


def _plain_line(view: RunView, news: News | None) -> str:
    match news:
        case None:
            return outcome(view)
        case trainer_pb2.StepMetrics():
            values = news.values
            return (
                f"step {news.step}/{view.run.total_steps}  score {values['score_mean']:.4g}  "
                f"kl {values['kl_per_sequence']:.4g}  reward {values['reward_mean']:.4g}  "
                f"{duration(news.step_s)} a step, {duration(view.left_s)} left"
            )
        case trainer_pb2.GetRunResponse():
            return f"{news.run_id or 'the run'}: {describe_state(news)}"
        case _:
            return sentence(news)


def _json_line(view: RunView, news: News | None) -> str:
    match news:
        case None:
            told: dict[str, Any] = {"event": "end", "state": view.state, "outcome": outcome(view)}
        case trainer_pb2.StepMetrics() | trainer_pb2.GetRunResponse():
            is_step = isinstance(news, trainer_pb2.StepMetrics)
            message = json_format.MessageToDict(
                news,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            message = {name: _number(name, value) for name, value in message.items()}
            told = {"event": "step" if is_step else "run", **message}
        case _:
            name = {Lost: "lost", Back: "back", StartedAgain: "started_again"}[type(news)]
            told = {"event": name, "message": sentence(news)}
    return json.dumps(told)


def _number(name: str, value: Any) -> Any:
    """protobuf's JSON writes integers of 64 bits as texts."""
    counts = ("step", "total_steps", "weights_version", "checkpoint_step")
    return int(value) if name in counts else value


def sentence(news: Lost | Back | StartedAgain) -> str:
    """What has happened to the connection."""
    match news:
        case Lost(error):
            return f"the trainer does not answer, and is asked again: {error}"
        case Back():
            return "the trainer answers again"
        case StartedAgain(step):
            return f"the trainer was started again, and goes on after step {step}"


def outcome(view: RunView) -> str:
    """How the run ended."""
    run = view.run
    where = f"after step {run.step} of {run.total_steps}"
    if run.state == trainer_pb2.RUN_STATE_COMPLETED:
        return f"complete: all {run.total_steps} steps are done"
    if run.state == trainer_pb2.RUN_STATE_FAILED:
        return f"failed {where}: {run.error_message}"
    return f"stopped {where}; kleash ppo --resume goes on"


# ----------------------------------------------------------------------------------------- terminal


class _Screen:
    """The picture of a run, and the keys that steer it.

    follow, in a thread ─► queue ─► watch: picture, keys ─► calls, in a pool ─► notices
    """

    def __init__(self, client: TrainerClient, target: Target, news: Iterator[News]) -> None:
        self._client = client
        self._place = target.address
        self._source = news
        self._news: queue.SimpleQueue[News | BaseException | None] = queue.SimpleQueue()
        self._view = RunView()
        self._notice = ""
        self._asks_to_stop = False
        self._calls: list[Future[str]] = []

    def watch(self) -> RunView | None:
        """Until the run is over; None when the reader leaves before."""
        from rich.console import Console
        from rich.live import Live

        from kleash.cli.keyboard import Keyboard
        from kleash.cli.watch_view import render

        console = Console()
        threading.Thread(target=self._read, name="watch", daemon=True).start()
        pool = ThreadPoolExecutor(2, "steer")
        try:
            with Keyboard() as keyboard, Live(console=console, auto_refresh=False) as live:
                while True:
                    is_over = self._take_news()
                    self._take_answers()
                    live.update(
                        render(
                            self._view,
                            width=min(console.width, 110),
                            place=self._place,
                            notice=self._notice,
                            has_keys=keyboard.is_there and not is_over,
                        ),
                        refresh=True,
                    )
                    if is_over:
                        return self._view
                    if self._obey(keyboard.key(KEY_WAIT_S), pool):
                        return None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self) -> None:
        try:
            for each in self._source:
                self._news.put(each)
            self._news.put(None)
        except BaseException as error:
            self._news.put(error)

    def _take_news(self) -> bool:
        """Whether the run is over. Raises what following it raised."""
        while not self._news.empty():
            news = self._news.get()
            if news is None:
                self._view.is_over = True
                self._notice = outcome(self._view)
                return True
            if isinstance(news, BaseException):
                raise news
            _take(self._view, news)
            if isinstance(news, Lost | Back | StartedAgain):
                self._notice = sentence(news)
        return False

    def _take_answers(self) -> None:
        for call in [each for each in self._calls if each.done()]:
            self._calls.remove(call)
            try:
                self._notice = call.result()
            except KleashError as error:
                self._notice = f"not done: {error}"

    def _obey(self, key: str, pool: ThreadPoolExecutor) -> bool:
        """Whether the reader leaves."""
        if self._asks_to_stop and key:
            self._asks_to_stop = False
            self._notice = ""
            if key in "yY":
                self._calls.append(pool.submit(self._stop))
            return False
        match key:
            case "q" | "Q":
                return True
            case "p":
                self._calls.append(pool.submit(self._pause))
            case "r":
                self._calls.append(pool.submit(self._resume))
            case "c":
                self._notice = "a checkpoint is written after the step in progress"
                self._calls.append(pool.submit(self._checkpoint))
            case "s":
                self._asks_to_stop = True
                self._notice = "stop the run after this step, with a checkpoint?  y / n"
        return False

    def _pause(self) -> str:
        self._client.pause()
        return "paused: the step in progress ends, and no other begins"

    def _resume(self) -> str:
        self._client.resume()
        return "resumed"

    def _checkpoint(self) -> str:
        saved = self._client.save_checkpoint()
        return f"the checkpoint of step {saved.step} is on disk: {saved.path}"

    def _stop(self) -> str:
        self._client.stop()
        return "the run ends after the step in progress"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "kleash watch",
        description="A PPO run as it goes. Keys: p pause, r resume, c checkpoint, s stop, q leave. "
        "Status: 0 the run is complete, was stopped or is left; 1 it has failed; 3 its trainer "
        "cannot be reached or refuses.",
        allow_abbrev=False,
    )
    parser.add_argument("target", metavar="TARGET", nargs="?", help=HELP)
    help_ = "a line for each step, as without a terminal"
    parser.add_argument("--plain", action="store_true", help=help_)
    help_ = "a JSON object for each step and each change of the run"
    parser.add_argument("--json", action="store_true", help=help_)
    help_ = "first step to show; without it those to come, and in a terminal the newest, too"
    parser.add_argument("--from_step", metavar="N", type=int, help=help_)
    help_ = "seconds to wait for a trainer that has gone away; 300 without it"
    parser.add_argument("--wait_s", metavar="N", type=float, default=300.0, help=help_)
    return parser

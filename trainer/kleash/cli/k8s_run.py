"""``kleash k8s run``, ``status``, ``logs``, ``pause``, ``resume`` and ``cancel``."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import pydantic

from kleash.base.config import Config
from kleash.base.errors import ConfigError, UserError
from kleash.cli.options import parse
from kleash.cli.output import show

if TYPE_CHECKING:
    from kleash.cluster.objects import Manifest, Objects
    from kleash.cluster.pipeline_config import PipelineConfig
    from kleash.cluster.run_record import RunRecord
    from kleash.cluster.stages import Stage

C = TypeVar("C", bound=Config)


class TargetConfig(Config):
    """Where to look."""

    namespace: str | None = None
    """Namespace of the run; null: that of the kubeconfig's context."""
    context: str | None = None
    """Context of the kubeconfig; null: the current one."""


class StatusConfig(TargetConfig):
    """kleash k8s status."""

    output: Literal["text", "json"] = "text"
    """text for people, json for programs."""


class LogsConfig(TargetConfig):
    """kleash k8s logs."""

    follow: bool = False
    """Go on with what comes, until the stage is over or Ctrl-C."""
    tail: int | None = pydantic.Field(default=None, ge=0)
    """Last lines of each pod to begin with; null: all."""


class CancelConfig(TargetConfig):
    """kleash k8s cancel."""

    delete_data: bool = False
    """Delete the claim with models and checkpoints, and the record, too."""
    wait_s: float = pydantic.Field(default=300.0, ge=0)
    """Seconds to wait for the pods to end; the trainer saves a checkpoint first."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb that ``arguments`` begins with."""
    verb, *rest = arguments
    return _VERBS[verb](rest)


def run_pipeline(arguments: Sequence[str]) -> int:
    """Take a run from stage to stage."""
    from kleash.base.logging import configure_logging
    from kleash.cluster.pipeline_config import PipelineConfig

    usage = "kleash k8s run PIPELINE.toml [--new] [--key=value ...]"
    rest = [argument for argument in arguments if argument != "--new"]
    config = parse(PipelineConfig, rest, usage=f"{usage}\n\n--new starts another run.")
    if config is None:
        return 0
    configure_logging("warning")
    path = _file_of(rest)
    with _connected(config) as objects:
        return _drive(objects, config, path, is_new="--new" in arguments)


def _drive(objects: Objects, config: PipelineConfig, path: Path | None, *, is_new: bool) -> int:
    from rich.console import Console

    from kleash.cluster import pipeline
    from kleash.cluster.open_run import find_or_name, open_record, render_run
    from kleash.cluster.progress import RunDisplay
    from kleash.cluster.run_record import RunState

    run_id = find_or_name(objects, config, is_new=is_new)
    manifests, values = render_run(
        config,
        run_id,
        objects.namespace,
        folder=path.parent if path else Path(),
        kube_version=objects.server_version(),
    )
    pipeline.try_objects(objects, run_id, manifests)
    text = path.read_text(encoding="utf-8") if path else ""
    record = open_record(objects, config, run_id, text=text, values=values)
    again = f"kleash k8s run {path or ''} --run_id={run_id}".replace("  ", " ")
    with RunDisplay(list(manifests), Console(stderr=True)) as display:
        display.note(
            f"run {run_id} in namespace {objects.namespace}; its objects: "
            f"kubectl get all -n {objects.namespace} -l kleash.dev/run={run_id}"
        )
        driver = pipeline.Driver(
            objects,
            record,
            manifests,
            display,
            again=again,
            patience_s=config.patience_s,
            keep_services=config.keep_services,
            poll_s=pipeline.POLL_S,
        )
        try:
            record = driver.run()
        except KeyboardInterrupt:
            display.note(
                f"interrupted: the stage goes on in the cluster; kleash k8s status {run_id} shows "
                f"it, '{again}' takes the run on to its next stage"
            )
            return 130
    if record.state is RunState.STOPPED:
        show(f"run {run_id}: {record.message}; '{again}' goes on from its checkpoint")
        return 0
    show(f"run {run_id}: complete, /runs/{run_id} on claim {_claim(manifests)}")
    return 0


def status(arguments: Sequence[str]) -> int:
    """All runs, or one."""
    names, config = _parse_names(StatusConfig, arguments, "kleash k8s status [RUN]", most=1)
    if config is None:
        return 0
    from kleash.cluster import run_status
    from kleash.cluster.run_record import find_runs, require_run

    with _connected(config) as objects:
        if names:
            found = run_status.describe_run(objects, require_run(objects, names[0]))
            is_json = config.output == "json"
            show(json.dumps(found, indent=2) if is_json else run_status.as_text(found))
            return 0
        rows = run_status.list_runs(objects, find_runs(objects))
        if config.output == "json":
            show(json.dumps(rows, indent=2))
        else:
            show(run_status.as_table(rows) or f"no runs in namespace {objects.namespace}")
    return 0


def logs(arguments: Sequence[str]) -> int:
    """Of a stage or a service."""
    usage = "kleash k8s logs [RUN] [STAGE] [--follow]"
    names, config = _parse_names(LogsConfig, arguments, usage, most=2)
    if config is None:
        return 0
    from kleash.cluster.run_logs import choose_stage, follow_logs, show_logs

    lock = threading.Lock()

    def show_line(line: str) -> None:
        with lock:
            show(line)

    with _connected(config) as objects:
        record = _run_of(objects, names[:1])
        stage, component = choose_stage(record, names[1] if len(names) == 2 else None)
        try:
            (follow_logs if config.follow else show_logs)(
                objects,
                record.run_id,
                stage,
                component,
                tail_lines=config.tail,
                show=show_line,
            )
        except KeyboardInterrupt:
            return 130
    return 0


def pause(arguments: Sequence[str]) -> int:
    """Suspend the run's Job."""
    names, config = _parse_names(TargetConfig, arguments, "kleash k8s pause [RUN]", most=1)
    if config is None:
        return 0
    from kleash.cluster import steering

    with _connected(config) as objects:
        show(steering.pause(objects, _run_of(objects, names).run_id))
    return 0


def resume(arguments: Sequence[str]) -> int:
    """Let a paused run go on."""
    names, config = _parse_names(TargetConfig, arguments, "kleash k8s resume [RUN]", most=1)
    if config is None:
        return 0
    from kleash.cluster import steering

    with _connected(config) as objects:
        show(steering.resume(objects, _run_of(objects, names).run_id))
    return 0


def cancel(arguments: Sequence[str]) -> int:
    """Remove a run; its name is required, and its data stays unless that is asked for."""
    usage = "kleash k8s cancel RUN [--delete_data]"
    names, config = _parse_names(CancelConfig, arguments, usage, most=1)
    if config is None:
        return 0
    from rich.console import Console

    from kleash.cluster import steering

    if not names:
        raise ConfigError("name the run to cancel; kleash k8s status lists the runs.")
    console = Console(stderr=True)
    with _connected(config) as objects:
        done = steering.cancel(
            objects,
            names[0],
            delete_data=config.delete_data,
            wait_s=config.wait_s,
            tell=lambda text: console.print(text, markup=False, highlight=False),
        )
    show(done)
    return 0


_VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run_pipeline,
    "status": status,
    "logs": logs,
    "pause": pause,
    "resume": resume,
    "cancel": cancel,
}


@contextlib.contextmanager
def _connected(config: TargetConfig | PipelineConfig) -> Iterator[Objects]:
    from kleash.cluster.connection import connect
    from kleash.cluster.objects import Objects, check_namespace

    with connect(config.context, config.namespace) as connection:
        objects = Objects(connection)
        check_namespace(objects)
        yield objects


def _run_of(objects: Objects, names: Sequence[str]) -> RunRecord:
    """The named run; without a name the only one that there is."""
    from kleash.cluster.run_record import find_runs, require_run

    if names:
        return require_run(objects, names[0])
    runs = find_runs(objects)
    if len(runs) != 1:
        there = ", ".join(record.run_id for record in runs) or "none"
        raise UserError(
            f"name the run, one of namespace {objects.namespace} ({there}); --namespace looks "
            "elsewhere."
        )
    return runs[0]


def _parse_names(
    config_class: type[C], arguments: Sequence[str], usage: str, *, most: int
) -> tuple[list[str], C | None]:
    """Names, which stand anywhere among the flags, and the configuration; None after --help."""
    names, flags = _split(config_class, arguments)
    if len(names) > most:
        raise ConfigError(f"'{names[most]}' is one name too many; usage: {usage}.")
    config = parse(config_class, flags, usage=f"{usage} [--key=value ...]")
    return names, config


def _split(config_class: type[Config], arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is not a flag nor a flag's value, and the rest, as kleash.base.config reads them."""
    names, flags, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            names.append(argument)
            continue
        flags.append(argument)
        field = config_class.model_fields.get(argument.lstrip("-").replace("-", "_"))
        if field is not None and field.annotation is not bool and rest:
            flags.append(rest.pop(0))
    return names, flags


def _file_of(arguments: Sequence[str]) -> Path | None:
    """The pipeline's file among the arguments of ``kleash k8s run``."""
    from kleash.cluster.pipeline_config import PipelineConfig

    names, _ = _split(PipelineConfig, arguments)
    return Path(names[0]) if names else None


def _claim(manifests: Mapping[Stage, Sequence[Manifest]]) -> str:
    from kleash.cluster.objects import CLAIM, kind_of, name_of

    claims = [
        name_of(manifest)
        for group in manifests.values()
        for manifest in group
        if kind_of(manifest) == CLAIM
    ]
    return ", ".join(claims) or "that the values name"

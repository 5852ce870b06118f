"""``kleash k8s logs --follow`` against a real API server that goes away now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes.client import ApiException
from tests.k8s.pipeline_cluster import Cluster
from urllib3.exceptions import ProtocolError

from kleash.cluster import run_logs
from kleash.cluster.connection import UnreachableError, translated
from kleash.cluster.objects import POD, Objects, name_of
from kleash.cluster.run_logs import follow_logs
from kleash.cluster.stages import Stage

pytestmark = pytest.mark.k8s

WAIT_S = 20.0


class Follower:
    """Follows the log of SFT in a thread; ``write`` is what its container prints."""

    def __init__(self, cluster: Cluster, tail_lines: int | None = None) -> None:
        self.cluster = cluster
        self.lines: list[str] = []
        self.problem: Exception | None = None
        self.tail_lines = tail_lines
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            follow_logs(
                self.cluster.objects,
                "alpha",
                Stage.SFT,
                None,
                tail_lines=self.tail_lines,
                show=self.lines.append,
                sleep=lambda _: time.sleep(0.05),
            )
        except Exception as error:
            self.problem = error

    @property
    def printed(self) -> list[str]:
        """Lines of the container, without what the command says itself."""
        return [line for line in self.lines if not line.startswith("(")]

    def write(self, *lines: str) -> None:
        (pod,) = [name_of(its) for its in self.cluster.objects.find(POD) if "sft" in name_of(its)]
        kubelet = self.cluster.controllers.kubelet
        assert kubelet is not None
        kubelet.log(self.cluster.namespace, pod, "kleash", *lines)

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while line not in self.lines:
            assert time.monotonic() < deadline, f"{line} did not come; {self.lines}"
            assert self.problem is None, self.problem
            time.sleep(0.02)

    def end(self) -> None:
        """The Job is complete, and with it the log."""
        self.cluster.controllers.outcomes_are_now("complete")
        for _ in range(4):
            self.cluster.controllers.step()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert self.problem is None, self.problem


@pytest.fixture
def follower(cluster: Cluster) -> Follower:
    cluster.controllers.script = {"sft": ["hang"]}
    cluster.controllers.lines["sft"] = ["one"]

    def is_in_sft() -> bool:
        pods = cluster.objects.find(POD)
        return any("sft" in name_of(pod) and pod["status"]["phase"] == "Running" for pod in pods)

    cluster.begin_and_die(is_in_sft)
    return Follower(cluster)


def breaking(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    """``follow_log`` whose first calls break off after some pieces, as when a server is killed."""
    breaks = [after, 0]

    def follow_log(self: Objects, pod: str, container: str, **options: Any) -> Iterator[bytes]:
        pieces = call(self, pod, container, **options)
        if not breaks:
            yield from pieces
            return
        with translated(f"log of pod {pod}", server="https://there"):
            for _ in range(breaks.pop(0)):
                yield next(pieces)
            pieces.close()
            raise ProtocolError("Connection broken.")

    return follow_log


@pytest.mark.parametrize("tail_lines", [None, 5])
def test_a_log_that_breaks_goes_on_behind_its_last_line(
    follower: Follower, tail_lines: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objects, "follow_log", breaking(Objects.follow_log, after=1))
    follower.tail_lines = tail_lines
    follower.thread.start()
    follower.wait_for("one")
    follower.write("two", "three")
    follower.wait_for("three")
    follower.end()
    assert follower.printed == ["one", "two", "three"]
    told = [line for line in follower.lines if line.startswith("(")]
    assert len(told) == 2
    assert told[0].startswith("(log of pod alpha-sft-")
    assert told[0].endswith("kubectl cluster-info. Following the log again.)")


def test_a_log_that_is_cut_off_goes_on(follower: Follower) -> None:
    """It seems to end, and the container runs: the node's agent was restarted, say."""
    follower.thread.start()
    follower.wait_for("one")
    kubelet = follower.cluster.controllers.kubelet
    assert kubelet is not None
    kubelet.cut()
    follower.write("two")
    follower.wait_for("two")
    follower.end()
    assert follower.lines == ["one", "two"]


def test_an_api_server_that_is_away_ends_nothing(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the stage is looked at, before and after its log."""
    dynamic = follower.cluster.objects.connection.dynamic
    request, count = dynamic.request, iter(range(1000))

    def request_at_times(*arguments: Any, **options: Any) -> Any:
        if next(count) % 2 == 0:
            raise ApiException(status=503, reason="Service Unavailable")
        return request(*arguments, **options)

    monkeypatch.setattr(dynamic, "request", request_at_times)
    follower.thread.start()
    follower.wait_for("one")
    follower.end()
    assert follower.printed == ["one"]


def test_one_that_stays_away_ends_it_with_a_sentence(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_arguments: Any, **_options: Any) -> Any:
        raise ProtocolError("Connection aborted.")

    monkeypatch.setattr(run_logs, "OUTAGE_S", 0.2)
    monkeypatch.setattr(follower.cluster.objects.connection.dynamic, "request", lose)
    follower.thread.start()
    follower.thread.join(WAIT_S)
    assert isinstance(follower.problem, UnreachableError)
    assert str(follower.problem).endswith("kubectl cluster-info. It was tried for 0.2 s.")

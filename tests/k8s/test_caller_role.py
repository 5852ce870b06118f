"""The Role for callers of `kleash k8s run` that docs/operations.md prints: enough, and no more."""

from __future__ import annotations

import re
from contextlib import closing
from typing import Any

import pytest
import yaml
from tests.k8s.chart import VARIANTS, StrictLoader, of_kind, render
from tests.k8s.controllers import Controllers
from tests.k8s.kubelet import Kubelet
from tests.k8s.pipeline_cluster import Account, Cluster
from tests.k8s.test_api_schemas import CUSTOM
from tests.k8s.tools import ROOT

from kleash.cluster.connection import connect
from kleash.cluster.objects import Objects, check_namespace
from kleash.cluster.pipeline import try_objects
from kleash.cluster.run_record import RunState
from kleash.cluster.stages import split
from kleash.cluster.steering import cancel

pytestmark = pytest.mark.k8s

PLURALS = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}
OF_THE_CLUSTER = {"ClusterRole", "ClusterRoleBinding"}
"""Made with auth.mode serviceAccount, by somebody with rights on the whole cluster."""
OF_TESTS = {"Pod"}
"""Made by `helm test`, which a run has not."""


def documented() -> list[dict[str, Any]]:
    """Objects of the page's YAML block that begins with the Role."""
    text = (ROOT / "docs" / "operations.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if "kind: Role\n" in block]
    return list(yaml.load_all(found, StrictLoader))


def rights() -> list[tuple[str, str, list[str]]]:
    """(API group, resource, verbs) of the Role."""
    (role,) = of_kind(documented(), "Role")
    return [
        (group, resource, rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    ]


def test_the_role_is_bound_and_has_no_wildcard() -> None:
    role, binding = documented()
    assert (role["kind"], binding["kind"]) == ("Role", "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "rlhf"
    assert "*" not in {part for group, resource, verbs in rights() for part in (group, resource)}
    assert "*" not in {verb for _, _, verbs in rights() for verb in verbs}
    assert "secrets" not in {resource for _, resource, _ in rights()}


def test_it_covers_every_kind_that_the_chart_makes(helm: object) -> None:
    may = {(group, resource): set(verbs) for group, resource, verbs in rights()}
    for path in VARIANTS:
        for item in render(path):
            kind = item["kind"]
            if kind in {*CUSTOM, *OF_THE_CLUSTER, *OF_TESTS}:
                continue
            group = item["apiVersion"].rpartition("/")[0]
            resource = PLURALS.get(kind, f"{kind.lower()}s")
            assert may.get((group, resource), set()) >= {
                "get",
                "list",
                "create",
                "patch",
                "delete",
            }, f"{kind} of {path.name}"


def test_the_api_server_lets_such_a_caller_make_the_chart(
    account: Account, helm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the trainer's Role: nobody may give rights that he has not."""
    monkeypatch.setenv("KUBECONFIG", str(account.may(*rights())))
    items = render(namespace=account.namespace, with_tests=False)
    with connect(namespace=account.namespace) as connection:
        objects = Objects(connection)
        check_namespace(objects)
        manifests = split(items, run_id="alpha")
        try_objects(objects, "alpha", manifests)
        roles = [each for group in manifests.values() for each in of_kind(group, "Role")]
        assert roles
        for role in roles:
            assert objects.apply(role)["rules"] == role["rules"]


def test_the_api_server_lets_such_a_caller_drive_and_cancel_a_run(
    account: Account, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(account.may(*rights())))
    with (
        connect(namespace=account.namespace) as connection,
        closing(Controllers(account.api, account.namespace, kubelet)) as controllers,
    ):
        cluster = Cluster(Objects(connection), controllers)
        assert cluster.begin().run().state is RunState.COMPLETE
        assert cluster.events(), "the right to write Events is missing"
        cluster.objects.warnings()
        done = cancel(
            cluster.objects, "alpha", delete_data=True, sleep=lambda _: cluster.controllers.step()
        )
        assert "is cancelled" in done

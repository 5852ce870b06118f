"""The chart lints and renders, and what the repository keeps of it is what it renders today."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.k8s.chart import (
    CHART,
    EXAMPLES,
    NAMESPACE,
    PREFIX,
    Object,
    RenderError,
    example_name,
    load_objects,
    name_of,
    of_kind,
    pods,
    render,
    render_text,
    selects,
)
from tests.k8s.render import differences, goldens, manifests
from tests.k8s.tools import run

pytestmark = pytest.mark.k8s

WITHOUT_NAMESPACE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "PriorityClass"}
CRD_KINDS = {
    "Certificate",
    "GRPCRoute",
    "HTTPRoute",
    "Issuer",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "ServiceMonitor",
}
"""Kinds that need a definition which a fresh cluster does not have."""


def test_the_examples_that_the_documentation_names_are_there() -> None:
    expected = {"cpu-demo", "gpu", "packed", "mtls", "keda", "kueue"}
    assert expected <= {example_name(path) for path in EXAMPLES}


def test_lint_of_the_defaults(helm: Path) -> None:
    done = run(helm, "lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_of_an_example(helm: Path, example: Path) -> None:
    done = run(helm, "lint", "--strict", str(CHART), f"--values={example}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_defaults_are_those_of_cpu_demo(defaults: list[Object]) -> None:
    assert defaults == render(CHART / "ci" / "cpu-demo-values.yaml")


def test_goldens_are_what_the_chart_renders(helm: Path) -> None:
    difference = differences(goldens())
    assert not difference, f"run `make goldens` and read the diff:\n{difference}"


def test_manifests_are_what_the_chart_renders(helm: Path) -> None:
    difference = differences(manifests())
    assert not difference, f"run `make manifests` and read the diff:\n{difference}"


def test_no_key_is_there_twice(helm: Path) -> None:
    text = "a: {b: 1, c: 2, b: 3}"
    with pytest.raises(Exception, match="key 'b' is there twice"):
        load_objects(text)
    for path in EXAMPLES:
        assert load_objects(render_text(path))


def test_every_object_names_its_namespace_and_is_there_once(objects: list[Object]) -> None:
    names = [name_of(item) for item in objects]
    assert len(names) == len(set(names))
    for item in objects:
        expected = None if item["kind"] in WITHOUT_NAMESPACE else NAMESPACE
        assert item["metadata"].get("namespace") == expected, name_of(item)


def test_every_object_has_the_recommended_labels(objects: list[Object]) -> None:
    for item in objects:
        labels = item["metadata"].get("labels", {})
        expected = {
            "app.kubernetes.io/name": "kleash",
            "app.kubernetes.io/instance": "demo",
            "app.kubernetes.io/part-of": "kleash",
            "app.kubernetes.io/managed-by": "Helm",
        }
        assert expected.items() <= labels.items(), name_of(item)
        assert {"app.kubernetes.io/version", "helm.sh/chart"} <= set(labels), name_of(item)


def test_pods_carry_the_run_they_belong_to(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert pod.labels.get("kleash.dev/run") == "demo", pod.name
        assert pod.owner["metadata"]["labels"].get("kleash.dev/run") == "demo", pod.name


def test_the_defaults_need_no_custom_resource(defaults: list[Object]) -> None:
    groups = {item["apiVersion"].partition("/")[0] for item in defaults}
    allowed = {"v1", "apps", "batch", "policy", "autoscaling", "networking.k8s.io"}
    assert groups <= allowed | {"rbac.authorization.k8s.io", "discovery.k8s.io"}
    assert not of_kind(defaults, *CRD_KINDS)


def test_the_demo_has_every_part_of_the_pipeline(defaults: list[Object]) -> None:
    components = {pod.component for pod in pods(defaults) if not pod.is_test}
    assert components == {"demo", "policy", "reward", "reference", "trainer"}
    assert [pod for pod in pods(defaults) if pod.is_test], "there is no pod for `helm test`"


def test_names_are_those_that_the_documentation_gives(defaults: list[Object]) -> None:
    names = {name_of(item) for item in defaults}
    expected = {f"Service/{PREFIX}-{part}" for part in ("policy", "reward", "reference")}
    expected |= {f"{name}-headless" for name in expected}
    expected |= {f"Service/{PREFIX}-trainer", f"PersistentVolumeClaim/{PREFIX}-runs"}
    assert expected <= names


def test_a_release_that_is_called_kleash_is_not_called_so_twice(helm: Path) -> None:
    names = {name_of(item) for item in render(release="kleash")}
    assert "Service/kleash-policy" in names


def test_two_releases_in_one_namespace_share_no_name(helm: Path, example: Path) -> None:
    one = {name_of(item) for item in render(example, release="one")}
    two = {name_of(item) for item in render(example, release="two")}
    assert one & two == set()


def test_selectors_of_two_releases_do_not_meet(defaults: list[Object]) -> None:
    other = list(pods(render(release="other")))
    for item in of_kind(defaults, "Service", "NetworkPolicy", "PodDisruptionBudget"):
        spec = item["spec"]
        selector = (
            {"matchLabels": spec["selector"]}
            if item["kind"] == "Service"
            else spec.get("podSelector") or spec.get("selector")
        )
        assert not [pod.name for pod in other if selects(selector, pod.labels)], name_of(item)


def test_names_of_a_long_release_stay_within_their_limits(helm: Path, example: Path) -> None:
    release = "a-release-name-of-fifty-three-characters-0123456789ab"
    assert len(release) == 53, "the longest that helm allows"
    items = render(example, release=release)
    names = [name_of(item) for item in items]
    assert len(names) == len(set(names))
    for item in items:
        name = item["metadata"]["name"]
        # A StatefulSet's pods get a label of its name and ten more characters.
        limit = {"Job": 63, "Service": 63, "StatefulSet": 52}.get(item["kind"], 63)
        assert len(name) <= limit, name
        assert name[-1].isalnum(), name
    for pod in pods(items):
        for key, value in pod.labels.items():
            assert len(value) <= 63, f"{pod.name} {key}={value}"
        for part in [*pod.containers, *pod.spec.get("volumes", [])]:
            assert len(part["name"]) <= 63, f"{pod.name} {part['name']}"


def test_an_upgrade_renames_a_job_when_its_template_changes_and_only_then(helm: Path) -> None:
    """A Job's template cannot be changed in place, so that `helm upgrade` needs a new one."""

    def jobs(*settings: str) -> dict[str, tuple[str, object]]:
        items = of_kind(render(settings=settings), "Job")
        return {
            item["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: (
                item["metadata"]["name"],
                item["spec"]["template"]["spec"],
            )
            for item in items
        }

    before, after = jobs(), jobs('image.tag="9.9.9"')
    assert before.keys() == after.keys() == {"trainer", "demo"}
    for component, (name, template) in before.items():
        new_name, new_template = after[component]
        assert template != new_template
        assert name != new_name, f"{name} would be refused by the API server: its template changed"
    unrelated = jobs('reward.podAnnotations={"example.org/a":"b"}')
    assert {name for name, _ in unrelated.values()} == {name for name, _ in before.values()}


def _changed_chart(folder: Path, old: str, new: str) -> Path:
    """A copy of the chart as a next version might be."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    path = chart / "templates" / "_job.tpl"
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
    return chart


@pytest.mark.parametrize(
    ("old", "new", "is_fixed"),
    [
        ("values: [2]", "values: [2, 3]", True),
        ("completions: 1", "completions: 1\ncompletionMode: Indexed", True),
        ("completions: 1", "completions: 2", True),
        ("parallelism: 1", "parallelism: 0", False),
    ],
)
def test_a_job_has_another_name_when_what_nobody_may_change_is_another(
    helm: Path, tmp_path: Path, old: str, new: str, is_fixed: bool
) -> None:
    """The API server refuses such an upgrade of the old Job: "field is immutable"."""

    def names(chart: Path) -> set[str]:
        done = run(helm, "template", "demo", str(chart))
        assert done.returncode == 0, done.stderr
        return {name_of(item) for item in of_kind(load_objects(done.stdout), "Job")}

    before, after = names(CHART), names(_changed_chart(tmp_path, old, new))
    assert len(before) == len(after) == 2
    assert (before & after == set()) is is_fixed


def test_nothing_of_an_install_is_another_at_the_upgrade(helm: Path, example: Path) -> None:
    """A Job that Kueue has let go would be stopped, and one that waits be started."""
    command = ("template", "demo", str(CHART), f"--values={example}")
    texts = [run(helm, *command, *extra).stdout for extra in ((), (), ("--is-upgrade",))]
    assert texts[0] == texts[1] == texts[2] != ""
    for job in of_kind(load_objects(texts[0]), "Job"):
        assert "suspend" not in job["spec"], f"{name_of(job)}: Kueue alone switches it"


def test_a_bad_value_is_refused_with_its_path(helm: Path) -> None:
    with pytest.raises(RenderError, match="replicaz"):
        render(settings=("policy.replicaz=1",))

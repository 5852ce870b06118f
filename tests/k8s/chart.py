"""The chart rendered by helm, as plain dictionaries, and the questions that tests ask of them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.k8s.tools import ROOT, find, run

CHART = ROOT / "k8s" / "chart"
RELEASE = "demo"
NAMESPACE = "rlhf"
PREFIX = f"{RELEASE}-kleash"
"""What the names of the objects start with: the chart's full name for this release."""

EXAMPLES = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
"""Values files that show a way to install; the defaults are those of cpu-demo."""
VARIANTS = (*EXAMPLES, *sorted((Path(__file__).parent / "values").glob("*-values.yaml")))
"""With others that take the ways of the chart that no example takes."""


def example_name(path: Path) -> str:
    """``gpu`` of ``ci/gpu-values.yaml``."""
    return path.name.removesuffix("-values.yaml")


Object = dict[str, Any]


class RenderError(Exception):
    """helm refused; the text is its message."""


class StrictLoader(yaml.CSafeLoader):
    """Reads YAML and refuses a mapping with one key twice, which YAML's own loaders let pass."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_objects(text: str) -> list[Object]:
    """The objects of a YAML stream; empty documents are left out."""
    documents = yaml.load_all(text, StrictLoader)
    return [document for document in documents if document is not None]


@functools.lru_cache(maxsize=256)
def render_text(
    *values: Path,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    settings: Sequence[str] = (),
    with_tests: bool = True,
    kube_version: str = "",
) -> str:
    """YAML that `helm template` prints; ``settings`` are ``key=value`` for ``--set-json``."""
    helm = find("helm")
    if helm is None:
        raise FileNotFoundError("helm is neither on PATH nor in build/tools: run `make k8s-tools`")
    arguments = ["template", release, str(CHART), f"--namespace={namespace}"]
    arguments += [f"--values={path}" for path in values]
    arguments += [f"--set-json={setting}" for setting in settings]
    arguments += [] if with_tests else ["--skip-tests"]
    arguments += [f"--kube-version={kube_version}"] if kube_version else []
    done = run(helm, *arguments)
    if done.returncode != 0:
        raise RenderError(done.stderr)
    return done.stdout


def render(
    *values: Path,
    release: str = RELEASE,
    namespace: str = NAMESPACE,
    settings: Sequence[str] = (),
    with_tests: bool = True,
) -> list[Object]:
    """The objects of a release, tests included."""
    text = render_text(
        *values,
        release=release,
        namespace=namespace,
        settings=tuple(settings),
        with_tests=with_tests,
    )
    return load_objects(text)


@dataclass(frozen=True)
class Pod:
    """The pods that one object makes: their labels, annotations and spec."""

    owner: Object
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: dict[str, Any]

    @property
    def name(self) -> str:
        """``Kind/name`` of the owner."""
        return name_of(self.owner)

    @property
    def component(self) -> str:
        """What the pod is for: policy, reward, reference, trainer, demo and so on."""
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Init containers first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def is_server(self) -> bool:
        """It runs until it is told to stop."""
        return self.owner["kind"] in ("Deployment", "StatefulSet")

    @property
    def is_test(self) -> bool:
        """`helm test` makes it."""
        return "helm.sh/hook" in self.owner["metadata"].get("annotations", {})

    def ports(self) -> dict[str, int]:
        """Ports of its containers by name."""
        return {
            port["name"]: port["containerPort"]
            for container in self.containers
            for port in container.get("ports", [])
        }


def name_of(item: Object) -> str:
    """``Kind/name``."""
    return f"{item['kind']}/{item['metadata']['name']}"


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """The objects of some kinds."""
    return [item for item in objects if item["kind"] in kinds]


def pods(objects: Sequence[Object]) -> Iterator[Pod]:
    """Every pod that the objects make."""
    for item in objects:
        if item["kind"] == "Pod":
            template: Mapping[str, Any] = item
        elif item["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            template = item["spec"]["template"]
        elif item["kind"] == "CronJob":
            template = item["spec"]["jobTemplate"]["spec"]["template"]
        else:
            continue
        metadata = template.get("metadata", {})
        labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
        yield Pod(item, labels, annotations, template["spec"])


def pod_of(objects: Sequence[Object], component: str) -> Pod:
    """The one pod of a component."""
    (found,) = [one for one in pods(objects) if one.component == component and not one.is_test]
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects; an empty one selects everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        value, values = labels.get(rule["key"]), rule.get("values", [])
        holds = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[rule["operator"]]
        if not holds:
            return False
    return True


def services_of(objects: Sequence[Object], pod: Pod) -> list[Object]:
    """The Services whose selector selects a pod."""
    return [
        service
        for service in of_kind(objects, "Service")
        if selects({"matchLabels": service["spec"].get("selector", {})}, pod.labels)
    ]

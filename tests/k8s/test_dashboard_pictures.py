"""How the dashboards' pictures are made, and that those of docs/ are of these dashboards."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from k8s.dashboards.answers import Curve, buckets, legend
from k8s.dashboards.draw import WIDTH_PX, height_px
from k8s.dashboards.saved import NAMES, dashboard, panels
from k8s.dashboards.units import in_unit
from PIL import Image
from tests.k8s.chart import of_kind, render
from tests.observed_run import NAMESPACE, RELEASE, target_labels

pytestmark = pytest.mark.k8s

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"
IMAGES = PAGE.parent / "images"
SECTION = re.MULTILINE | re.DOTALL


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0, "short", None, "0"),
        (1536, "short", None, "1.54 K"),
        (3, "short", None, "3"),
        (-0.00123, "short", None, "-0.00123"),
        (0.99138, "percentunit", 3, "99.138 %"),
        (0.5, "percentunit", None, "50 %"),
        (0.25, "s", None, "250 ms"),
        (0.000004, "s", None, "4 µs"),
        (90, "s", None, "1.5 min"),
        (0, "s", None, "0 s"),
        (1536, "bytes", None, "1.5 KiB"),
        (12, "bytes", None, "12 B"),
        (2_500_000, "Bps", None, "2.5 MB/s"),
        (2400, "ops", None, "2.4 K ops/s"),
        (0.5, "reqps", None, "0.5 req/s"),
        (float("nan"), "short", None, "-"),
    ],
)
def test_units(value: float, unit: str, decimals: int | None, text: str) -> None:
    assert in_unit(value, unit, decimals) == text


def test_every_unit_can_be_written() -> None:
    for name in NAMES:
        for panel in panels(dashboard(name)):
            assert in_unit(1.0, panel["fieldConfig"]["defaults"]["unit"])


def test_buckets_are_differences() -> None:
    """Prometheus counts what is at most the bound; a heatmap shows what is between two."""
    found = [
        Curve("", {"le": bound}, np.array(values, dtype=float))
        for bound, values in (("+Inf", [9, 9]), ("-1", [2, 0]), ("0.5", [5, 9]))
    ]
    bounds, filled = buckets(found)
    assert bounds == [-1, 0.5, float("inf")]
    assert filled.tolist() == [[2, 0], [3, 9], [4, 0]]


def test_legends() -> None:
    labels = {"grpc_method": "Score", "grpc_code": "OK"}
    assert legend("{{grpc_method}} {{grpc_code}}", labels) == "Score OK"
    assert legend("{{job}}", labels) == ""
    assert legend("p95", labels) == "p95"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_of_these_dashboards(name: str) -> None:
    path = IMAGES / f"dashboard-{name}.png"
    with Image.open(path) as image:
        expected = (WIDTH_PX, height_px(dashboard(name)))
        assert image.size == expected, "stale: run `make dashboard-pictures` and look at it"
    assert path.stat().st_size < 400_000


def test_observed_targets_have_the_labels_of_the_monitors(helm: Path) -> None:
    """What Prometheus is told about a process in the tests is what the operator would tell it."""
    settings = ("metrics.serviceMonitor.enabled=true", "metrics.podMonitor.enabled=true")
    items = render(settings=(*settings, "trainer.enabled=true"))
    [services], [trainer] = of_kind(items, "ServiceMonitor"), of_kind(items, "PodMonitor")
    scraped = {
        item["metadata"]["name"]
        for item in of_kind(items, "Service")
        if item["metadata"]["labels"].get("kleash.dev/scrape") == "true"
    }
    labels = {
        component: target_labels(component, 0, address="10.0.0.1:9090")
        for component in ("policy", "reward", "reference", "trainer")
    }
    assert {labels[name]["job"] for name in labels if name != "trainer"} == scraped
    assert labels["trainer"]["job"] == f"{NAMESPACE}/{trainer['metadata']['name']}"
    for monitor in (services, trainer):
        [endpoint] = monitor["spec"].get("endpoints") or monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["honorLabels"] is True
        for pod_label in monitor["spec"]["podTargetLabels"]:
            name = "".join(letter if letter.isalnum() else "_" for letter in pod_label)
            assert all(name in each for each in labels.values()), pod_label
    pods = {
        item["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: item["spec"][
            "template"
        ]
        for kind in ("Deployment", "Job")
        for item in of_kind(items, kind)
    }
    for component, expected in labels.items():
        pod = pods[component]
        assert [each["name"] for each in pod["spec"]["containers"]] == [expected["container"]]
        own = pod["metadata"]["labels"]
        assert own["app.kubernetes.io/part-of"] == expected["app_kubernetes_io_part_of"]
        assert own["app.kubernetes.io/instance"] == expected["app_kubernetes_io_instance"]
        assert own["kleash.dev/run"] == expected["kleash_dev_run"] == RELEASE


def test_the_page_names_panels_that_exist() -> None:
    """Bold words of docs/observability.md are titles of panels, or how they begin."""
    page = PAGE.read_text(encoding="utf-8")
    sections = dict(zip(NAMES, re.findall(r"^## Kleash / .*?(?=^## )", page, SECTION), strict=True))
    for name, section in sections.items():
        assert section.startswith(f"## {dashboard(name)['title']}\n")
        assert f"(images/dashboard-{name}.png)" in section
        titles = [panel["title"] for panel in panels(dashboard(name))]
        named = re.findall(r"\*\*(.+?)\*\*", section)
        assert len(named) > 8
        assert [each for each in named if not any(t.startswith(each) for t in titles)] == []


def test_the_page_links_to_what_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text(encoding="utf-8"))
    assert len(links) >= 5
    assert [link for link in links if not (PAGE.parent / link).exists()] == []

"""docs/ppo.md names functions and tests: each of them must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kleash.ppo import loss

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")


def test_every_named_test_exists() -> None:
    names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TEXT)
    assert len(names) > 40
    assert len(names) == TEXT.count("::")
    missing = [
        f"{file}::{name}"
        for file, name in names
        if f"def {name}(" not in (ROOT / "tests" / "unit" / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_headings_name_exactly_the_functions_of_the_loss_module() -> None:
    public = {
        name
        for name, value in vars(loss).items()
        if callable(value) and getattr(value, "__module__", "") == loss.__name__
    }
    functions = {name for name in public if name[0].islower()}
    headings = re.findall(r"^## .*|^\*\*.*\*\* \([^)]*\)", TEXT, flags=re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", "\n".join(headings)))
    estimators_for_plots = {"kl_k2_per_token", "kl_k3_per_token"}
    assert named == functions - estimators_for_plots
    assert all(f"`{name}`" in TEXT for name in estimators_for_plots)

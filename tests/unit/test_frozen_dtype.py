"""The data type that "auto" stands for, and the passes that a batch is computed in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.classifier_folders import write_classifier

from kleash.lm import frozen
from kleash.lm.config import Dtype
from kleash.lm.frozen import BFLOAT16_GAIN, choose_dtype
from kleash.lm.sequences import CPU_PASS_TOKENS, passes
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def seconds(monkeypatch: pytest.MonkeyPatch, full: float, half: float) -> None:
    taken = {torch.float32: full, torch.bfloat16: half}
    monkeypatch.setattr(frozen, "_product_s", lambda dtype: taken[dtype])


def test_auto_on_a_cpu_is_bfloat16_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds(monkeypatch, full=1.0, half=0.9 / BFLOAT16_GAIN)
    assert choose_dtype("auto", CPU) == "bfloat16"
    seconds(monkeypatch, full=1.0, half=1.1 / BFLOAT16_GAIN)
    assert choose_dtype("auto", CPU) == "float32"


@pytest.mark.parametrize(("has", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_on_a_gpu_is_bfloat16_where_it_has_it(
    monkeypatch: pytest.MonkeyPatch, has: bool, dtype: str
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has and not including_emulation
    )
    assert choose_dtype("auto", GPU) == dtype


def test_a_named_data_type_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(frozen, "_product_s")
    assert choose_dtype("float16", CPU) == "float16"


@pytest.mark.parametrize(("half", "dtype"), [(0.1, "bfloat16"), (1.0, "float32")])
def test_the_service_tells_what_auto_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: float, dtype: Dtype
) -> None:
    seconds(monkeypatch, full=1.0, half=half)
    folder = write_classifier(tmp_path, "llama")
    reward = LocalReward.load(RewardConfig(model=folder, dtype="auto"))
    told = reward.get_model()
    assert told.dtype == dtype
    assert told.batch_tolerance == frozen.BATCH_TOLERANCE[dtype]
    assert next(reward.model.frozen.model.parameters()).dtype == getattr(torch, dtype)  # type: ignore[attr-defined]


def test_a_cpu_computes_a_batch_in_passes_that_fit_its_cache() -> None:
    lengths = [500, 20, 500, 500, 20]
    groups = passes(lengths, CPU)
    assert sorted(row for group in groups for row in group) == [0, 1, 2, 3, 4]
    assert all(len(g) * max(lengths[row] for row in g) <= CPU_PASS_TOKENS for g in groups)
    assert len(groups) == 3
    assert passes(lengths, GPU) == [[0, 1, 2, 3, 4]]

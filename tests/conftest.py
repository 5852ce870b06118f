"""Shared fixtures: tiny real models in Hugging Face folders, made once a session."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kleash.lm.heads import Normalization, reward_model_from_causal_lm
from kleash.lm.load import load_tokenizer, save_checkpoint_folder
from kleash.lm.tiny import Kind, write_tiny_folder
from kleash.rpc import client_metrics

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TEXTS = [
    "<|user|>What is 3 plus 4?<|assistant|>3 plus 4 is 7.<|end|>",
    "<|user|>Which is bigger, 9 or 12?<|assistant|>12 is bigger.<|end|>",
    "the quick brown fox jumps over the lazy dog and says hello to the world",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread a process: the machines that test are small, and results stay bit-identical."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_log_handler_stays() -> Iterator[None]:
    """A command that runs in this process logs to a stream that pytest closes after the test."""
    before = list(logging.root.handlers)
    yield
    for handler in set(logging.root.handlers) - set(before):
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _client_metrics_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer turns them on for its process, and the next test has the same one."""
    monkeypatch.setattr(client_metrics, "_is_enabled", False)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Random-weight causal language models by kind: llama, qwen2, gpt2."""
    root = tmp_path_factory.mktemp("models")
    kinds: tuple[Kind, ...] = ("llama", "qwen2", "gpt2")
    return {kind: write_tiny_folder(root / kind, kind, TEXTS) for kind in kinds}


@pytest.fixture(scope="session")
def tiny_folder(tiny_folders: dict[Kind, Path]) -> Path:
    """A random-weight Llama folder."""
    return tiny_folders["llama"]


@pytest.fixture(scope="session")
def tiny_reward_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward-model folder with a random head and normalization (0.25, 2.0)."""
    folder = tmp_path_factory.mktemp("reward") / "llama-reward"
    model = reward_model_from_causal_lm(tiny_folder, seed=1)
    Normalization(0.25, 2.0).store(model.config)
    save_checkpoint_folder(model, load_tokenizer(tiny_folder), folder, {"stage": "reward-model"})
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium for a module's tests; they are skipped where there is none."""
    from tests.browser import find_chromium, launched

    if find_chromium() is None:
        pytest.skip("there is no chromium on PATH; make apt-tools installs it")
    with launched() as its:
        yield its

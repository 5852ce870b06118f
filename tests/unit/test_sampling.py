"""Counter-based random numbers and the distribution that tokens are drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kleash.lm.sampling import sample_tokens, uniforms

pytestmark = pytest.mark.unit

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.5, 0.5, -0.5])
NUM_DRAWS = 40_000

SETTINGS = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.5, "top_k": 3, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
]


def expected_distribution(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Slow reference in float64: temperature, then the k largest, then the smallest set >= p."""
    logits = LOGITS.double().numpy() / temperature
    order = np.argsort(-logits, kind="stable")
    if top_k:
        # Equal logits at the border are all kept.
        order = [i for i in order if logits[i] >= logits[order[top_k - 1]]]
    probs = np.zeros(len(logits))
    probs[order] = np.exp(logits[order]) / np.exp(logits[order]).sum()
    if top_p < 1:
        kept, reached = [], 0.0
        for index in order:
            if reached >= top_p:
                break
            kept.append(index)
            reached += probs[index]
        dropped = np.setdiff1d(np.arange(len(probs)), kept)
        probs[dropped] = 0
        probs /= probs.sum()
    return probs


def draw(random: np.ndarray, **settings: float) -> tuple[np.ndarray, np.ndarray]:
    logits = LOGITS.expand(len(random), -1)
    tokens, log_probs = sample_tokens(logits, torch.from_numpy(random), **settings)  # type: ignore[arg-type]
    return tokens.numpy(), log_probs.numpy()


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_follow_the_processed_distribution(settings: dict) -> None:
    """Chi-square of 40 000 draws against softmax(logits / T) cut by top-k and top-p; p > 0.001."""
    probs = expected_distribution(**settings)
    tokens, _ = draw(uniforms(7, "prompt", 0, NUM_DRAWS), **settings)
    counts = np.bincount(tokens, minlength=len(probs))
    kept = probs > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - NUM_DRAWS * probs[kept]) ** 2 / (NUM_DRAWS * probs[kept])).sum()
    critical = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
    assert chi_square < critical[kept.sum() - 1]


@pytest.mark.parametrize("settings", SETTINGS)
def test_log_probs_are_those_of_the_processed_distribution(settings: dict) -> None:
    """ppo.md section 4, rows 33 and 34: exp of the log-probs of all tokens sums to 1."""
    probs = expected_distribution(**settings)
    tokens, log_probs = draw(np.linspace(0, 1, 5001)[:-1], **settings)
    of_token = dict(zip(tokens.tolist(), log_probs.tolist(), strict=True))
    assert sorted(of_token) == np.flatnonzero(probs).tolist()
    assert sum(math.exp(value) for value in of_token.values()) == pytest.approx(1, abs=1e-6)
    for token, value in of_token.items():
        assert value == pytest.approx(math.log(probs[token]), abs=1e-6)


def test_raw_log_probs_would_be_seen() -> None:
    """ppo.md row 34: at T = 0.6 the processed and the raw log-probs are far apart."""
    tokens, log_probs = draw(uniforms(7, "prompt", 0, 100), temperature=0.6)
    raw = LOGITS.log_softmax(-1).numpy()[tokens]
    assert np.abs(log_probs - raw).max() > 0.2


def test_inversion_takes_the_token_whose_interval_holds_the_number() -> None:
    edges = np.cumsum(LOGITS.double().softmax(-1).numpy())
    for token in range(len(LOGITS)):
        low = edges[token - 1] if token else 0.0
        tokens, _ = draw(np.array([low + 1e-6, edges[token] - 1e-6]))
        assert tokens.tolist() == [token, token]


def test_extreme_numbers_stay_in_the_kept_set() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    random = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens, log_probs = sample_tokens(logits, random)
    assert tokens.tolist() == [1, 2]
    assert torch.isfinite(log_probs).all()


def test_temperature_zero_takes_the_most_probable() -> None:
    tokens, log_probs = draw(uniforms(0, "p", 0, 5), temperature=0.0)
    assert tokens.tolist() == [0] * 5
    assert log_probs.tolist() == [0.0] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_a_known_token_and_a_nan_log_prob(temperature: float) -> None:
    tokens, log_probs = sample_tokens(
        torch.full((1, 4), torch.nan),
        torch.tensor([0.5], dtype=torch.float64),
        temperature=temperature,
    )
    assert 0 <= int(tokens) < 4
    assert torch.isnan(log_probs).all()


def test_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 50, generator=generator)
    random = torch.from_numpy(uniforms(0, "p", 0, 16))
    tokens, log_probs = sample_tokens(logits, random, temperature=0.7, top_p=0.9)
    for row in range(16):
        alone = sample_tokens(logits[[row]], random[[row]], temperature=0.7, top_p=0.9)
        assert alone[0].item() == tokens[row].item()
        assert alone[1].item() == log_probs[row].item()


def test_uniforms_are_the_same_for_ever() -> None:
    """A resumed run, a retry or another replica draws the same: these numbers must not change."""
    expected = [0.05452335571673095, 0.6795262535556955, 0.9340659144072848]
    assert uniforms(0, "prompt-1", 0, 3).tolist() == expected


def test_uniforms_do_not_depend_on_how_many_are_asked_for() -> None:
    assert np.array_equal(uniforms(3, "a", 1, 10), uniforms(3, "a", 1, 1000)[:10])


def test_uniforms_of_other_counters_are_unrelated() -> None:
    counters = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (11, "a", 1), (1, "1", 11)]
    streams = [uniforms(*counter, 2000) for counter in counters]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.1
    assert all(stream.min() >= 0 and stream.max() < 1 for stream in streams)

"""Response log-probabilities: facts/ppo.md section 2.1 and section 4, rows 1-5 and 10."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.lm.load import load_causal_lm
from kleash.lm.log_probs import entropy, response_log_probs, response_logits, token_log_probs
from kleash.lm.sequences import PackedBatch, TokenSequence, pack
from kleash.lm.tiny import Kind

pytestmark = pytest.mark.unit

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gpt2")
# (tokens, response_start): mixed lengths and starts, a one-token response, an empty one.
SHAPES = [(9, 3), (21, 12), (5, 4), (7, 7), (14, 1)]


@pytest.fixture(scope="module")
def models(tiny_folders: dict[Kind, Path]) -> dict[Kind, Any]:
    return {kind: load_causal_lm(tiny_folders[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    random = np.random.default_rng(7)
    return [
        TokenSequence(random.integers(5, 300, length).astype(np.int32), start)
        for length, start in SHAPES
    ]


def oracle(model: Any, sequence: TokenSequence, temperature: float) -> np.ndarray:
    """log softmax(logits / T) of each response token, from transformers' logits, in float64."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().numpy() / temperature
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    positions = range(sequence.response_start, len(sequence.ids))
    return np.array([log_probs[t - 1, sequence.ids[t]] for t in positions])


@torch.no_grad()
def own(model: Any, sequences: list[TokenSequence], temperature: float = 1.0) -> list[np.ndarray]:
    rows = response_log_probs(model, pack(sequences), temperature).numpy()
    return [row[: s.response_length] for row, s in zip(rows, sequences, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_log_softmax_of_transformers(
    models: dict[Kind, Any], sequences: list[TokenSequence], kind: Kind, temperature: float
) -> None:
    """Rows 1-3: logits[t-1] / T predict token t; alone in transformers, padded together here."""
    for row, sequence in zip(own(models[kind], sequences, temperature), sequences, strict=True):
        np.testing.assert_allclose(row, oracle(models[kind], sequence, temperature), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_row_does_not_depend_on_neighbours(
    models: dict[Kind, Any], sequences: list[TokenSequence], kind: Kind
) -> None:
    """Rows 4 and 5: a row in a padded batch equals the row alone."""
    for row, sequence in zip(own(models[kind], sequences), sequences, strict=True):
        np.testing.assert_allclose(row, own(models[kind], [sequence])[0], atol=1e-5)


def test_detectors_would_see_the_bugs(
    models: dict[Kind, Any], sequences: list[TokenSequence]
) -> None:
    """An off-by-one slice and a wrong temperature are orders of magnitude above the tolerance."""
    sequence = sequences[1]
    shifted = TokenSequence(sequence.ids, sequence.response_start + 1)
    right = oracle(models["llama"], sequence, 0.7)
    assert np.abs(right[:-1] - oracle(models["llama"], shifted, 0.7)).max() > 1e-3
    assert np.abs(right - own(models["llama"], [sequence], 1.0)[0]).max() > 1e-3


def test_pad_id_changes_nothing(models: dict[Kind, Any], sequences: list[TokenSequence]) -> None:
    """Row 5: no real token attends to a pad, so any id there gives the same bits."""
    batch = pack(sequences)
    columns = torch.arange(batch.ids.shape[1])
    refilled = torch.where(columns >= batch.lengths[:, None], 123, batch.ids)
    other = PackedBatch(refilled, batch.lengths, batch.response_starts, batch.num_response_columns)
    with torch.no_grad():
        for model in models.values():
            assert torch.equal(response_log_probs(model, batch), response_log_probs(model, other))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_left_padded_forward(
    models: dict[Kind, Any], sequences: list[TokenSequence], kind: Kind
) -> None:
    """Checklist G4: left padding with a mask and shifted positions is the same function."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.zeros((len(sequences), width), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence.ids) :] = torch.from_numpy(sequence.ids)
    lengths = torch.tensor([len(s.ids) for s in sequences])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        log_probs = (
            models[kind](input_ids=ids, attention_mask=mask, position_ids=positions)
            .logits[:, :-1]
            .log_softmax(-1)
        )
    chosen = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1).numpy()
    for row, own_row, sequence in zip(chosen, own(models[kind], sequences), sequences, strict=True):
        np.testing.assert_allclose(own_row, row[width - 1 - sequence.response_length :], atol=1e-5)


def test_zero_outside_of_mask_and_empty_response(
    models: dict[Kind, Any], sequences: list[TokenSequence]
) -> None:
    batch = pack(sequences)
    log_probs = response_log_probs(models["llama"], batch)
    assert log_probs.shape == (len(sequences), max(s.response_length for s in sequences))
    assert torch.equal(log_probs != 0, batch.response_mask)
    assert not log_probs[3].any()
    assert own(models["llama"], [sequences[3]])[0].shape == (0,)


def test_mask_survives_non_finite_logits() -> None:
    """A pad may point at a forbidden token (logit minus infinity); the result there is still 0."""
    logits = torch.tensor([[[0.0, 0.0], [-torch.inf, 0.0]]])
    ids, mask = torch.tensor([[1, 0]]), torch.tensor([[True, False]])
    assert token_log_probs(logits, ids, mask).tolist() == [[pytest.approx(np.log(0.5)), 0.0]]


def test_dropout_is_off_even_when_the_folder_has_it(
    tiny_folders: dict[Kind, Path], tmp_path: Path, sequences: list[TokenSequence]
) -> None:
    """Row 10: two forward passes of one batch are equal, in training mode too."""
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_folders["gpt2"], folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_causal_lm(folder).train()
    batch = pack(sequences)
    assert torch.equal(response_log_probs(model, batch), response_log_probs(model, batch))


def test_gradient_reaches_only_what_the_response_saw(
    models: dict[Kind, Any], sequences: list[TokenSequence]
) -> None:
    """Summing the masked log-probs gives no gradient through pad positions."""
    logits = response_logits(models["llama"], pack(sequences)).detach().requires_grad_()
    batch = pack(sequences)
    token_log_probs(logits, batch.response_ids, batch.response_mask).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) != 0, batch.response_mask)


def test_bad_arguments_are_refused(models: dict[Kind, Any], sequences: list[TokenSequence]) -> None:
    with pytest.raises(ValueError, match="temperature is 0"):
        response_log_probs(models["llama"], pack(sequences), 0.0)
    no_prompt = TokenSequence(sequences[0].ids, 0)
    with pytest.raises(ValueError, match="needs a prompt token"):
        response_log_probs(models["llama"], pack([sequences[1], no_prompt]))


def test_entropy_by_hand() -> None:
    """Uniform over 8: ln 8. Probabilities (1/2, 1/4, 1/4): 1.5 ln 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(np.log(8), abs=1e-6)
    assert entropy(logits).item() == pytest.approx(1.5 * np.log(2), abs=1e-6)

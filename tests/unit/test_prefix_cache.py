"""Prompts that a running row holds are copied from it: same result, and only while it is true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.generate import generate
from kleash.lm.load import load_causal_lm
from kleash.lm.tiny import Kind

pytestmark = pytest.mark.unit

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gpt2")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tiny_folders: dict[Kind, Path]) -> Any:
    return sharp(load_causal_lm(tiny_folders[request.param]))


@pytest.fixture
def llama(tiny_folder: Path) -> Any:
    return sharp(load_causal_lm(tiny_folder))


def sharp(model: Any) -> Any:
    """Larger weights: a fresh model is near uniform, and mistakes would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def samples_of(length: int, count: int, *, first_token: int = 20) -> list[DecodeRequest]:
    """Samples of one prompt, of different lengths so that rows leave and move."""
    prompt = np.arange(first_token, first_token + length, dtype=np.int32)
    return [
        DecodeRequest(prompt, f"p{first_token}", index, seed=3, max_new_tokens=4 + 3 * (index % 4))
        for index in range(count)
    ]


def rest_of(decoder: Decoder) -> dict[DecodeRequest, Decoded]:
    finished: list[Decoded] = []
    while decoder.num_active:
        finished += decoder.step()
    return {its.request: its for its in finished}


def assert_close(first: Sequence[Decoded], second: Sequence[Decoded]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-6)


def alone(model: Any, requests: Sequence[DecodeRequest]) -> list[Decoded]:
    """Each request by itself: nobody is there to copy from."""
    return [generate(model, [request])[0] for request in requests]


def count_prefilled(model: Any) -> list[int]:
    """A list that gets the number of prompts in every prefill forward."""
    counts: list[int] = []

    def note(_: object, __: object, settings: dict[str, Any]) -> None:
        if settings["input_ids"].shape[1] > 1:
            counts.append(len(settings["input_ids"]))

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return counts


def test_later_samples_copy_the_prompt_and_draw_the_same(model: Any) -> None:
    """More samples than slots: rows leave, move and are copied from after many own tokens."""
    requests = [*samples_of(9, 9), *samples_of(6, 7, first_token=50)]
    expected = alone(model, requests)
    decoder = Decoder(model, max_slots=4, max_length=32)
    results: dict[DecodeRequest, Decoded] = {}
    waiting = list(requests)
    while waiting or decoder.num_active:
        take = min(decoder.num_free, len(waiting))
        decoder.add([waiting.pop(0) for _ in range(take)])
        results.update((its.request, its) for its in decoder.step())
    assert_close(expected, [results[request] for request in requests])
    # Four samples of each prompt at most are computed: those that nobody held when they joined.
    assert decoder.num_prefix_hits + decoder.num_prefix_misses == len(requests)
    assert decoder.num_prefix_hits >= 8


def test_a_hit_computes_nothing_and_copies_prompt_columns_only(llama: Any) -> None:
    first, second = samples_of(9, 2)
    expected = alone(llama, [first, second])
    counts = count_prefilled(llama)
    decoder = Decoder(llama, max_slots=4, max_length=32)
    decoder.add([first])
    decoder.step()
    decoder.step()
    decoder.add([second])
    assert counts == [1]
    assert (decoder.num_prefix_hits, decoder.num_prefix_misses) == (1, 1)
    for layer in decoder._cache.slot_layers:
        for buffer in layer.buffers():
            assert torch.equal(buffer[1, :, :8], buffer[0, :, :8])
            assert buffer[0, :, 8:10].abs().min() > 0  # tokens of the first response
            assert not buffer[1, :, 8:].any()
    results = rest_of(decoder)
    assert_close(expected, [results[first], results[second]])


def test_the_last_prompt_token_may_differ(llama: Any) -> None:
    """It is read by the next step; a shorter or longer prefix is another one."""
    (held,) = samples_of(9, 1)
    others = [
        replace(held, prompt=prompt, prompt_id=f"other{index}")
        for index, prompt in enumerate(
            (np.append(held.prompt[:-1], np.int32(7)), held.prompt[:-1], np.append(held.prompt, 7))
        )
    ]
    expected = alone(llama, others)
    decoder = Decoder(llama, max_slots=4, max_length=32)
    decoder.add([held])
    decoder.add(others)
    assert (decoder.num_prefix_hits, decoder.num_prefix_misses) == (1, 3)
    results = rest_of(decoder)
    assert_close(expected, [results[request] for request in others])


def test_only_rows_that_run_now_are_copied_from(llama: Any) -> None:
    """Bits of a request do not depend on what was generated before it."""
    first, second, third = samples_of(9, 3)
    decoder = Decoder(llama, max_slots=2, max_length=32)
    decoder.add([first])
    rest_of(decoder)
    decoder.add([second])
    decoder.remove(second)
    decoder.add([third])
    assert decoder.num_prefix_hits == 0
    lone = generate(llama, [third])[0]
    again = rest_of(decoder)[third]
    assert again.ids.tobytes() == lone.ids.tobytes()
    assert again.log_probs.tobytes() == lone.log_probs.tobytes()


def test_prompts_of_one_token_have_no_prefix(llama: Any) -> None:
    first, second = samples_of(1, 2)
    decoder = Decoder(llama, max_slots=2, max_length=32)
    decoder.add([first])
    decoder.add([second])
    assert (decoder.num_prefix_hits, decoder.num_prefix_misses) == (0, 0)
    results = rest_of(decoder)
    assert_close(alone(llama, [first, second]), [results[first], results[second]])


def negate(model: Any) -> None:
    """Other weights; twice gives the first ones."""
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.neg_()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_change_of_weights_makes_old_prompts_useless(llama: Any, version: int) -> None:
    """Even one that leaves the number of the version as it was: version 2, then other weights."""
    first, second, third = samples_of(9, 3)
    decoder = Decoder(llama, max_slots=4, max_length=32)
    decoder.weights_version = 2
    decoder.add([first])
    decoder.step()
    negate(llama)
    decoder.weights_version = version
    expected = alone(llama, [second, third])
    decoder.add([second])
    decoder.step()
    assert decoder.num_prefix_hits == 0
    decoder.add([third])  # the second row holds its prompt under the new weights
    assert decoder.num_prefix_hits == 1
    results = rest_of(decoder)
    assert_close(expected, [results[second], results[third]])


def test_a_rollback_does_not_bring_old_prompts_back(llama: Any) -> None:
    """A row of version 1 is of no use to another version 1, published after a rollback."""
    first, second = samples_of(9, 2)
    decoder = Decoder(llama, max_slots=4, max_length=32)
    decoder.weights_version = 1
    decoder.add([first])
    decoder.step()
    decoder.weights_version = 0
    negate(llama)
    decoder.weights_version = 1
    expected = alone(llama, [second])
    decoder.add([second])
    assert decoder.num_prefix_hits == 0
    assert_close(expected, [rest_of(decoder)[second]])


def test_rows_computed_again_may_be_copied_from(llama: Any) -> None:
    first, second = samples_of(9, 2)
    decoder = Decoder(llama, max_slots=4, max_length=32)
    decoder.add([first])
    decoder.step()
    negate(llama)
    decoder.weights_version = 1
    decoder.refill_cache()
    expected = alone(llama, [second])
    decoder.add([second])
    assert decoder.num_prefix_hits == 1
    assert_close(expected, [rest_of(decoder)[second]])

"""Decoding in slots, on real tiny models of three architectures, against whole forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kleash.base.errors import ModelError, UserError
from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.generate import check_decodable, generate
from kleash.lm.load import load_causal_lm
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.lm.tiny import Kind, build_causal_lm

pytestmark = pytest.mark.unit

KINDS: tuple[Kind, ...] = ("llama", "qwen2", "gpt2")
STOP = frozenset(range(1, 15))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny_folders: dict[Kind, Path]) -> Any:
    return sharp(load_causal_lm(tiny_folders[request.param]))


@pytest.fixture(scope="module")
def llama(tiny_folder: Path) -> Any:
    return sharp(load_causal_lm(tiny_folder))


def sharp(model: Any) -> Any:
    """Larger weights: a fresh model is near uniform, and mistakes would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def requests_of(
    model: Any, count: int, *, max_new_tokens: int = 16, **settings: Any
) -> list[DecodeRequest]:
    """``count`` requests with prompts of 1 to 23 tokens."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 24, count)
    return [
        DecodeRequest(
            prompt=rng.integers(0, model.config.vocab_size, length).astype(np.int32),
            prompt_id=f"p{index}",
            sample_index=0,
            seed=9,
            max_new_tokens=max_new_tokens,
            **{"stop_ids": STOP, **settings},
        )
        for index, length in enumerate(lengths)
    ]


def forward_log_probs(
    model: Any, results: Sequence[Decoded], temperature: float = 1.0
) -> list[np.ndarray]:
    """Log-probs of the responses from one forward over whole sequences."""
    sequences = [
        TokenSequence(np.append(its.request.prompt, its.ids), len(its.request.prompt))
        for its in results
    ]
    with torch.inference_mode():
        values = response_log_probs(model, pack(sequences), temperature).numpy()
    return [row[: len(its.ids)] for row, its in zip(values, results, strict=True)]


def largest_gap(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def assert_same(left: Sequence[Decoded], right: Sequence[Decoded]) -> None:
    """Same tokens, log-probs within 1e-5."""
    for a, b in zip(left, right, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.finish_reason == b.finish_reason
    assert largest_gap([its.log_probs for its in left], [its.log_probs for its in right]) < 1e-5


def rest_of(decoder: Decoder) -> list[Decoded]:
    """What the running sequences of ``decoder`` become."""
    finished: list[Decoded] = []
    while decoder.num_active:
        finished += decoder.step()
    return finished


def test_log_probs_equal_those_of_a_forward(model: Any) -> None:
    """ppo.md section 4, rows 1, 4, 5: prompts of many lengths, slots refilled; at most 1e-5."""
    results = generate(model, requests_of(model, 40), max_slots=7)
    expected = forward_log_probs(model, results)
    own = [its.log_probs for its in results]
    assert largest_gap(own, expected) < 1e-5
    longer = [its for its in results if len(its.ids) > 1]
    shifted = [row[:-1] for row in forward_log_probs(model, longer)]
    assert largest_gap([its.log_probs[1:] for its in longer], shifted) > 1  # off by one is seen


def test_log_probs_carry_the_temperature(model: Any) -> None:
    """ppo.md rows 2 and 34: T divides the logits in the sampler as in the trainer."""
    results = generate(model, requests_of(model, 20, temperature=0.6), max_slots=8)
    own = [its.log_probs for its in results]
    assert largest_gap(own, forward_log_probs(model, results, temperature=0.6)) < 1e-5
    assert largest_gap(own, forward_log_probs(model, results)) > 0.5  # raw ones are seen


def test_top_k_and_top_p_renormalize(model: Any) -> None:
    """ppo.md row 33: log-probs are of the distribution drawn from, not of the whole one."""
    results = generate(model, requests_of(model, 10, top_k=4), max_slots=8)
    for result in results:
        sequence = np.append(result.request.prompt, result.ids)
        with torch.inference_mode():
            logits = model(torch.from_numpy(sequence.astype(np.int64))[None]).logits[0]
        for step, token in enumerate(result.ids):
            best = logits[len(result.request.prompt) + step - 1].topk(4)
            kept = best.indices.tolist()
            assert token in kept
            expected = best.values.log_softmax(-1)[kept.index(token)].item()
            assert result.log_probs[step] == pytest.approx(expected, abs=1e-5)


def test_greedy_equals_transformers_generate(model: Any) -> None:
    requests = requests_of(model, 6, temperature=0.0, max_new_tokens=12)
    for result in generate(model, requests, max_slots=4):
        prompt = torch.from_numpy(result.request.prompt.astype(np.int64))[None]
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(STOP),
            pad_token_id=0,
        )
        assert result.ids.tolist() == whole[0, prompt.shape[1] :].tolist()
        assert not result.log_probs.any()


def test_results_do_not_depend_on_slots_order_or_neighbours(model: Any) -> None:
    requests = requests_of(model, 17)
    together = generate(model, requests, max_slots=64)
    assert_same(together, generate(model, requests, max_slots=3))
    assert_same(together[::-1], generate(model, requests[::-1], max_slots=8))
    assert_same(together, [generate(model, [its], max_slots=1)[0] for its in requests])
    assert_same(together[3:9], generate(model, requests[3:9], max_slots=5))


def test_the_same_requests_give_the_same_bits(llama: Any) -> None:
    first, second = (generate(llama, requests_of(llama, 24), max_slots=8) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.ids.tobytes() == b.ids.tobytes()
        assert a.log_probs.tobytes() == b.log_probs.tobytes()


def test_stop_and_length(model: Any) -> None:
    """ppo.md row 29: the stop token is the last one and the only one of its kind."""
    results = generate(model, requests_of(model, 40), max_slots=16)
    reasons = {its.finish_reason for its in results}
    assert reasons == {"stop", "length"}
    for result in results:
        is_stop = np.isin(result.ids, list(STOP))
        assert not is_stop[:-1].any()
        assert is_stop[-1] == (result.finish_reason == "stop")
        assert result.finish_reason == "stop" or len(result.ids) == 16
        assert result.ids.dtype == np.int32
        assert result.log_probs.dtype == np.float32


def test_the_context_ends_a_response(llama: Any) -> None:
    """256 positions: a prompt of 250 leaves six tokens, one of 255 leaves one."""
    prompt = np.full(255, 20, dtype=np.int32)
    long, longest = (
        DecodeRequest(prompt[:length], "p", 0, 0, max_new_tokens=99) for length in (250, 255)
    )
    results = generate(llama, [long, longest])
    assert [len(its.ids) for its in results] == [6, 1]
    assert [its.finish_reason for its in results] == ["length", "length"]
    assert largest_gap([its.log_probs for its in results], forward_log_probs(llama, results)) < 1e-5
    with pytest.raises(UserError, match="256 tokens; it needs at least 1, and at most 255"):
        generate(llama, [DecodeRequest(np.zeros(256, np.int32), "p", 0, 0, max_new_tokens=1)])


def test_settings_of_one_batch_may_differ(llama: Any) -> None:
    requests = [
        replace(request, **settings)
        for request, settings in zip(
            requests_of(llama, 12),
            [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5, "stop_ids": frozenset()}] * 3,
            strict=True,
        )
    ]
    together = generate(llama, requests, max_slots=5)
    assert_same(together, [generate(llama, [its])[0] for its in requests])


def test_a_retry_draws_the_same(llama: Any) -> None:
    """Any subset of the samples, in another batch with other slots, gives the same tokens."""
    prompts = requests_of(llama, 3)
    samples = [replace(its, sample_index=index) for its in prompts for index in range(6)]
    whole = generate(llama, samples, max_slots=18)
    assert len({its.ids.tobytes() for its in whole}) > 9  # samples of a prompt differ
    retried = generate(llama, samples[4::3], max_slots=2)
    assert_same(whole[4::3], retried)


def test_weights_version_is_stamped_on_tokens(llama: Any) -> None:
    """ppo.md row 35: spans follow the change; earlier tokens and keys stay as they were."""
    requests = requests_of(llama, 3, max_new_tokens=10, stop_ids=frozenset())
    before = generate(llama, requests)
    decoder = Decoder(llama, max_slots=4, max_length=64)
    decoder.weights_version = 4
    decoder.add(requests[:2])
    for _ in range(3):
        decoder.step()
    decoder.weights_version = 5
    decoder.weights_version = 6  # no token was drawn with 5
    decoder.add(requests[2:])
    finished = rest_of(decoder)
    by_id = {its.request.prompt_id: its for its in finished}
    assert by_id["p0"].versions == by_id["p1"].versions == [(0, 3, 4), (3, 10, 6)]
    assert by_id["p2"].versions == [(0, 10, 6)]
    assert_same(before, [by_id[f"p{index}"] for index in range(3)])


def test_abort_leaves_rows_that_have_drawn_nothing(llama: Any) -> None:
    """With their keys and values computed again they are as if they had never started."""
    requests = requests_of(llama, 4, stop_ids=frozenset())
    expected = generate(llama, requests)
    decoder = Decoder(llama, max_slots=4, max_length=64)
    decoder.add(requests[:2])
    decoder.step()
    with torch.no_grad():
        llama.model.norm.weight.mul_(2)
        llama.model.layers[0].self_attn.k_proj.weight.neg_()
    decoder.add(requests[2:])
    with torch.no_grad():
        llama.model.norm.weight.div_(2)
        llama.model.layers[0].self_attn.k_proj.weight.neg_()
    decoder.weights_version = 1
    aborted = decoder.abort()
    assert [(its.finish_reason, its.versions) for its in aborted] == [("aborted", [(0, 1, 0)])] * 2
    assert [its.ids.tolist() for its in aborted] == [its.ids[:1].tolist() for its in expected[:2]]
    assert decoder.running == requests[2:]
    decoder.refill_cache()
    finished = rest_of(decoder)
    assert_same(expected[2:], sorted(finished, key=lambda its: its.request.prompt_id))
    assert all(its.versions == [(0, 16, 1)] for its in finished)


def test_removed_requests_leave_the_others_alone(llama: Any) -> None:
    requests = requests_of(llama, 6, stop_ids=frozenset())
    expected = generate(llama, requests)
    decoder = Decoder(llama, max_slots=4, max_length=64)
    decoder.add(requests[:4])
    decoder.step()
    decoder.remove(requests[1])
    decoder.remove(requests[3])
    decoder.remove(requests[5])  # not running
    assert decoder.num_free == 2
    decoder.step()
    decoder.add(requests[4:])
    finished = rest_of(decoder)
    by_id = {its.request.prompt_id: its for its in finished}
    assert sorted(by_id) == ["p0", "p2", "p4", "p5"]
    assert_same([expected[index] for index in (0, 2, 4, 5)], [by_id[key] for key in sorted(by_id)])


def test_a_broken_model_does_not_poison_its_slots(llama: Any) -> None:
    requests = requests_of(llama, 4, stop_ids=frozenset())
    expected = generate(llama, requests)
    decoder = Decoder(llama, max_slots=2, max_length=64)
    norm = llama.model.norm.weight
    key = llama.model.layers[0].self_attn.k_proj.weight
    kept = [norm.detach().clone(), key.detach().clone()]
    with torch.no_grad():
        norm.fill_(torch.nan)
        key.fill_(torch.nan)
    decoder.add(requests[:2])
    broken = rest_of(decoder)
    assert all(np.isnan(its.log_probs).all() for its in broken)
    with torch.no_grad():
        norm.copy_(kept[0])
        key.copy_(kept[1])
    decoder.add(requests[2:])
    healed = rest_of(decoder)
    by_id = {its.request.prompt_id: its for its in healed}
    assert_same(expected[2:], [by_id["p2"], by_id["p3"]])


def test_rows_removed_under_a_broken_model_do_not_poison_slots(llama: Any) -> None:
    """Nor do the copies of rows that moved: every slot is used again afterwards."""
    requests = requests_of(llama, 8, stop_ids=frozenset())
    expected = generate(llama, requests)
    decoder = Decoder(llama, max_slots=4, max_length=64)
    key = llama.model.layers[0].self_attn.k_proj.weight
    kept = key.detach().clone()
    with torch.no_grad():
        key.fill_(torch.nan)
    decoder.add([replace(its, max_new_tokens=20) for its in requests[:4]])
    decoder.step()
    decoder.remove(decoder.running[0])
    decoder.step()  # the last row moves into its slot
    for request in decoder.running:
        decoder.remove(request)
    with torch.no_grad():
        key.copy_(kept)
    decoder.weights_version = 1
    decoder.add(requests[4:])
    finished = rest_of(decoder)
    assert_same(expected[4:], sorted(finished, key=lambda its: its.request.prompt_id))


def test_bfloat16_stays_within_its_rounding(tiny_folder: Path) -> None:
    """ppo.md row 44: decoding and a whole forward of the same bfloat16 model."""
    model = load_causal_lm(tiny_folder, dtype="bfloat16")
    results = generate(model, requests_of(model, 8), max_slots=4)
    own = [its.log_probs for its in results]
    assert largest_gap(own, forward_log_probs(model, results)) < 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_heads_and_wide_batches(kind: Kind) -> None:
    """Prompts over the prefill budget take several forwards with the same result."""
    model = sharp(build_causal_lm(kind, vocab_size=60, num_heads=2))
    requests = requests_of(model, 12)
    expected = generate(model, requests)
    decoder = Decoder(model, max_slots=12, max_length=64, max_batch_tokens=16)
    decoder.add(requests)
    finished: dict[str, Decoded] = {}
    while decoder.num_active:
        finished.update((its.request.prompt_id, its) for its in decoder.step())
    assert_same(expected, [finished[its.prompt_id] for its in requests])


def test_grouped_query_attention() -> None:
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = sharp(transformers.AutoModelForCausalLM.from_config(config).eval())
    results = generate(model, requests_of(model, 9), max_slots=4)
    assert largest_gap([its.log_probs for its in results], forward_log_probs(model, results)) < 1e-5


def test_a_short_sliding_window_is_refused() -> None:
    config = transformers.MistralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=20,
    )
    model = sharp(transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ModelError, match="mistral model attends to a sliding window of 20 tokens"):
        Decoder(model, max_slots=2, max_length=21)
    results = generate(model, [DecodeRequest(np.arange(8, dtype=np.int32), "p", 0, 0, 12)])
    assert largest_gap([its.log_probs for its in results], forward_log_probs(model, results)) < 1e-5


def test_a_state_space_model_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="mamba model has layers without plain attention"):
        check_decodable(model)


def test_a_model_with_wrong_cached_log_probs_is_refused(tiny_folder: Path) -> None:
    """Positions that do not reach the attention: right with one forward, wrong with a cache."""
    model = sharp(load_causal_lm(tiny_folder))
    rotary = model.model.rotary_emb.forward

    def from_zero(hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return rotary(hidden, torch.arange(hidden.shape[1])[None].expand(len(hidden), -1))

    model.model.rotary_emb.forward = from_zero
    with pytest.raises(ModelError, match=r"llama model differ by .* nats between a KV cache"):
        check_decodable(model)

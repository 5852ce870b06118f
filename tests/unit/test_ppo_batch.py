"""RolloutBatch checks its parts once and selects rows; the KL controllers keep their state."""

from __future__ import annotations

import doctest
from dataclasses import fields, replace

import pytest
import torch

from kleash.ppo import batch as batch_module
from kleash.ppo.batch import RolloutBatch
from kleash.ppo.kl_controller import AdaptiveKL, FixedKL

pytestmark = pytest.mark.unit


@pytest.fixture
def batch() -> RolloutBatch:
    """Prompts of 2, 1 and 3 tokens; responses of 3, 1 and 0."""
    mask = torch.arange(3) < torch.tensor([3, 1, 0])[:, None]

    def numbers(offset: float) -> torch.Tensor:
        return torch.where(mask, offset + torch.arange(9.0).reshape(3, 3), torch.nan)

    return RolloutBatch(
        prompt_ids=("a", "b", "c"),
        ids=torch.tensor([[5, 6, 7, 8, 2], [5, 9, 0, 0, 0], [4, 5, 6, 0, 0]]),
        lengths=torch.tensor([5, 2, 3]),
        response_starts=torch.tensor([2, 1, 3]),
        mask=mask,
        behaviour_log_probs=numbers(-10),
        old_log_probs=numbers(-20),
        reference_log_probs=numbers(-30),
        old_values=numbers(0),
        scores=torch.tensor([1.0, 2.0, 3.0]),
        is_stopped=torch.tensor([True, False, False]),
        weights_version=torch.tensor([4, 4, 5]),
    )


def test_counts(batch: RolloutBatch) -> None:
    assert len(batch) == 3
    assert batch.num_tokens == 4
    assert batch.response_lengths.tolist() == [3, 1, 0]


def test_select_keeps_the_order_and_trims_padding(batch: RolloutBatch) -> None:
    part = batch.select([2, 1])
    assert part.prompt_ids == ("c", "b")
    assert part.ids.tolist() == [[4, 5, 6], [5, 9, 0]]
    assert part.mask.tolist() == [[False], [True]]
    assert part.old_log_probs[1].tolist() == [-17.0]
    assert part.scores.tolist() == [3.0, 2.0]
    assert part.weights_version.tolist() == [5, 4]
    assert part.advantages is None


def test_select_depends_on_the_chosen_rows_alone(batch: RolloutBatch) -> None:
    """The same two rows out of a wide batch and out of a narrow one are the same tensors."""
    direct = batch.select(torch.tensor([1, 2]))
    stepwise = batch.select([1, 2, 0]).select([0, 1])
    for field in fields(RolloutBatch):
        one, other = getattr(direct, field.name), getattr(stepwise, field.name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def test_targets_travel_with_their_rows(batch: RolloutBatch) -> None:
    """advantages and returns are checked and selected like the rest."""
    numbers = torch.arange(9.0).reshape(3, 3)
    done = batch.with_advantages(numbers, -numbers).select([1])
    assert done.advantages is not None
    assert done.returns is not None
    assert done.advantages.tolist() == [[3.0]]
    assert done.returns.tolist() == [[-3.0]]
    assert batch.advantages is None
    with pytest.raises(ValueError, match=r"RolloutBatch.returns is \(3, 2\)"):
        batch.with_advantages(numbers, numbers[:, :2])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("old_values", torch.zeros(3, 2), r"old_values is \(3, 2\) torch.float32; .*\(3, 3\)"),
        ("scores", torch.zeros(3, 1), r"scores is \(3, 1\) torch.float32; .* \(3,\)"),
        ("scores", torch.zeros(3, dtype=torch.float64), r"scores is \(3,\) torch.float64"),
        ("mask", torch.ones(3, 3), r"mask is \(3, 3\) torch.float32; .* torch.bool"),
        ("prompt_ids", ("a", "b"), r"ids is \(3, 5\) torch.int64; 2 prompt_ids"),
        ("mask", torch.ones(3, 3, dtype=torch.bool), r"mask row 1 has 3 tokens .* first 1 "),
        ("lengths", torch.tensor([6, 2, 3]), r"row 0 has length 6 and response_start 2 in 5"),
        ("lengths", torch.tensor([5, 2, 2]), r"row 2 has length 2 and response_start 3"),
        ("response_starts", torch.tensor([2, 0, 3]), r"row 1 has length 2 and response_start 0"),
        ("scores", torch.tensor([0.0, torch.nan, 0.0]), r"scores\[1\] is nan \(prompt 'b'\)"),
        ("old_values", torch.full((3, 3), torch.inf), r"old_values\[0, 0\] is inf"),
    ],
)
def test_wrong_parts_are_named(
    batch: RolloutBatch, field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(batch, **{field: value})  # pyright: ignore[reportArgumentType]


def test_a_response_wider_than_the_mask_is_an_error(batch: RolloutBatch) -> None:
    narrow = {
        field.name: getattr(batch, field.name)[:, :2]
        for field in fields(RolloutBatch)
        if field.name == "mask" or "log_probs" in field.name or field.name == "old_values"
    }
    with pytest.raises(ValueError, match=r"mask row 0 has 2 tokens in 2 columns; .* first 3 "):
        replace(batch, **narrow)


def test_select_of_nothing_is_an_error(batch: RolloutBatch) -> None:
    with pytest.raises(ValueError, match="no rows"):
        batch.select([])


def test_docstring_example_runs() -> None:
    result = doctest.testmod(batch_module)
    assert result.attempted >= 3
    assert result.failed == 0


def test_to_keeps_everything(batch: RolloutBatch) -> None:
    moved = batch.to("cpu")
    assert moved.prompt_ids == batch.prompt_ids
    assert torch.equal(moved.ids, batch.ids)
    assert moved.returns is None


def test_fixed_kl_does_not_move_and_has_no_state() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, num_episodes=512)
    assert controller.coefficient == 0.05
    controller.load_state_dict(controller.state_dict())
    with pytest.raises(ValueError, match=r"adaptive KL coefficient .* fixed one \(0.05\)"):
        controller.load_state_dict({"coefficient": 0.3})


def test_adaptive_kl_resumes_where_it_stopped() -> None:
    """P21: five updates in one go equal two, a save, a load, and three."""
    kls = [9.0, 2.0, 6.5, 30.0, 5.9]
    straight, first = AdaptiveKL(0.1, 6, 100), AdaptiveKL(0.1, 6, 100)
    for kl in kls:
        straight.update(kl, num_episodes=8)
    for kl in kls[:2]:
        first.update(kl, num_episodes=8)
    second = AdaptiveKL(0.7, 6, 100)
    second.load_state_dict(first.state_dict())
    for kl in kls[2:]:
        second.update(kl, num_episodes=8)
    assert second.coefficient == straight.coefficient
    with pytest.raises(ValueError, match="fixed KL coefficient, this run has an adaptive"):
        second.load_state_dict({})


@pytest.mark.parametrize(("coefficient", "target", "horizon"), [(0, 6, 1), (1, 0, 1), (1, 6, 0)])
def test_adaptive_kl_needs_positive_numbers(
    coefficient: float, target: float, horizon: float
) -> None:
    with pytest.raises(ValueError, match="needs positive numbers"):
        AdaptiveKL(coefficient, target, horizon)

from __future__ import annotations

import math

import pytest
import torch

from cdpo_core.dual.lagrangian import importance_weights, lagrangian_reward, preference_probability, relabel
from cdpo_core.randomness import torch_stream


@pytest.mark.parametrize(
    ("reward", "costs", "lambda_", "expected"),
    [
        (1.0, [2.0], [0.0], 1.0),
        (1.0, [2.0], [0.5], 0.0),
        (1.0, [-2.0], [0.5], 2.0),
        (1.0, [2.0, -1.0], [0.5, 3.0], 3.0),
    ],
)
def test_lagrangian_reward_values(reward: float, costs: list[float], lambda_: list[float], expected: float) -> None:
    r_lambda = lagrangian_reward(torch.tensor(reward), torch.tensor(costs), torch.tensor(lambda_))
    assert r_lambda.item() == pytest.approx(expected)


def test_lagrangian_reward_keeps_leading_shape() -> None:
    reward, costs = torch.randn(3, 5), torch.randn(3, 5, 2)
    r_lambda = lagrangian_reward(reward, costs, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(r_lambda, reward - 0.5 * costs[..., 0] - 2.0 * costs[..., 1])


@pytest.mark.parametrize("lambda_", [[-0.1], [math.nan], [math.inf]])
def test_lagrangian_reward_refuses_bad_multipliers(lambda_: list[float]) -> None:
    with pytest.raises(ValueError, match="lambda"):
        lagrangian_reward(torch.zeros(2), torch.zeros(2, 1), torch.tensor(lambda_))


def test_lagrangian_reward_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        lagrangian_reward(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0]))


def test_preference_probability_is_bradley_terry() -> None:
    probability = preference_probability(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    assert probability[0, 1].item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert probability[1, 2].item() == pytest.approx(1 / (1 + math.exp(3)))
    torch.testing.assert_close(probability + probability.mT, torch.ones(3, 3, dtype=torch.float64))
    shifted = preference_probability(torch.tensor([101.0, 100.0, 103.0], dtype=torch.float64))
    torch.testing.assert_close(shifted, probability)


@pytest.mark.parametrize("mode", ["soft", "sampled", "hard"])
def test_labels_of_a_pair_add_up_to_one(mode: str) -> None:
    r_lambda = torch.randn(4, 6, generator=torch_stream(0, "scores"))
    targets = relabel(r_lambda, mode, torch_stream(0, "labels"))  # type: ignore[arg-type]
    torch.testing.assert_close(targets + targets.mT, torch.ones(4, 6, 6))
    torch.testing.assert_close(torch.diagonal(targets, dim1=-2, dim2=-1), torch.full((4, 6), 0.5))


def test_sampled_labels_have_the_soft_labels_as_expectation() -> None:
    r_lambda = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)
    draws = relabel(r_lambda.expand(20000, 3), "sampled", torch_stream(0, "labels"))
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert set(draws[:, off_diagonal].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draws.mean(dim=0), relabel(r_lambda, "soft"), atol=0.015, rtol=0)


def test_sampled_labels_follow_their_stream() -> None:
    r_lambda = torch.zeros(5, 8)
    first, again, other = (relabel(r_lambda, "sampled", torch_stream(0, "labels", step)) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_hard_labels_take_the_larger_and_halve_ties() -> None:
    targets = relabel(torch.tensor([1.0, 1.0, -2.0]), "hard")
    assert targets.tolist() == [[0.5, 0.5, 1.0], [0.5, 0.5, 1.0], [0.0, 0.0, 0.5]]


def test_relabel_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="generator"):
        relabel(torch.zeros(2), "sampled")
    with pytest.raises(ValueError, match="unknown"):
        relabel(torch.zeros(2), "best")  # type: ignore[arg-type]


def test_importance_weights_correct_for_the_policy_that_drew() -> None:
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    other = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    r_lambda, beta = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0.5
    optimum = torch.softmax(reference.log() + r_lambda / beta, dim=-1)
    # Weighted by how often each response is drawn, the weights must rebuild the tilted policy.
    drawn = other * torch.exp(r_lambda / beta + (reference / other).log())
    weights = importance_weights(r_lambda, beta, (reference / other).log())
    torch.testing.assert_close(drawn / drawn.sum(), optimum)
    torch.testing.assert_close(other * weights / (other * weights).sum(), optimum)
    torch.testing.assert_close(importance_weights(r_lambda, beta).sum(), torch.tensor(1.0, dtype=torch.float64))

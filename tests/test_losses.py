"""The losses against hand-computed values, their gradients, and the identities that tie them together."""

from __future__ import annotations

import math

import pytest
import torch

from cdpo_core.dual.lagrangian import lagrangian_reward, preference_probability, relabel
from cdpo_core.learning.losses import (
    anchor_loss,
    bradley_terry_loss,
    cost_loss,
    dpo_loss,
    flag_loss,
    sft_loss,
    soft_dpo_loss,
)

LOG2 = math.log(2)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nats(margin: float) -> float:
    """−log σ(margin)."""
    return math.log1p(math.exp(-margin))


@pytest.mark.parametrize(
    ("policy", "reference", "beta", "p", "expected"),
    [
        ((-1.0, -2.0), (-1.0, -2.0), 0.5, 1.0, LOG2),  # the reference itself: nothing learned yet
        ((-1.0, -3.0), (-1.0, -2.0), 0.5, 1.0, nats(0.5)),
        ((-3.0, -1.0), (-1.0, -2.0), 1.0, 1.0, nats(-3.0)),
        ((-1.0, -3.0), (-1.0, -2.0), 0.5, 0.0, nats(-0.5)),
        ((-1.0, -3.0), (-1.0, -2.0), 2.0, 0.25, 0.25 * nats(2.0) + 0.75 * nats(-2.0)),
        ((0.0, -2000.0), (0.0, 0.0), 1.0, 1.0, 0.0),  # no overflow far out
        ((-2000.0, 0.0), (0.0, 0.0), 1.0, 1.0, 2000.0),
    ],
)
def test_dpo_loss_values(
    policy: tuple[float, float], reference: tuple[float, float], beta: float, p: float, expected: float
) -> None:
    chosen, rejected = tensor(policy[0]), tensor(policy[1])
    loss = dpo_loss(chosen, rejected, tensor(reference[0]), tensor(reference[1]), beta, p)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_soft_dpo_is_dpo_averaged_over_the_pairs_of_a_group() -> None:
    torch.manual_seed(0)
    log_probs, reference, reward = torch.randn(3, 2, 5, dtype=torch.float64).unbind(0)
    targets = preference_probability(reward)
    expected = torch.stack(
        [
            dpo_loss(log_probs[:, j], log_probs[:, k], reference[:, j], reference[:, k], 0.3, targets[:, j, k])
            for j in range(5)
            for k in range(5)
            if j != k
        ]
    ).mean(0)
    torch.testing.assert_close(soft_dpo_loss(log_probs - reference, targets, 0.3), expected)


def test_lambda_zero_with_soft_labels_is_dpo_on_bradley_terry_preferences_of_the_reward() -> None:
    reward, costs = tensor(1.0, -0.5), torch.tensor([[5.0], [-5.0]], dtype=torch.float64)
    log_ratio = tensor(0.2, -0.7).requires_grad_()
    targets = relabel(lagrangian_reward(reward, costs, tensor(0.0)), "soft")
    constrained = soft_dpo_loss(log_ratio, targets, 0.5)
    plain = dpo_loss(log_ratio[0], log_ratio[1], tensor(0.0)[0], tensor(0.0)[0], 0.5, torch.sigmoid(tensor(1.5))[0])
    torch.testing.assert_close(constrained, plain)
    torch.testing.assert_close(torch.autograd.grad(constrained, log_ratio)[0], torch.autograd.grad(plain, log_ratio)[0])


def test_the_expected_gradient_of_sampled_labels_is_that_of_soft_labels() -> None:
    r_lambda = tensor(0.0, 0.8, -1.2, 2.0)
    log_ratio = tensor(0.3, -0.1, 0.5, 0.0).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    gradients = []
    for _ in range(draws):
        targets = relabel(r_lambda, "sampled", generator)
        gradients.append(torch.autograd.grad(soft_dpo_loss(log_ratio, targets, 0.5), log_ratio)[0])
    drawn = torch.stack(gradients)
    soft = torch.autograd.grad(soft_dpo_loss(log_ratio, relabel(r_lambda, "soft"), 0.5), log_ratio)[0]
    error = drawn.std(0) / math.sqrt(draws)
    assert ((drawn.mean(0) - soft).abs() < 4.5 * error).all()


def test_the_minimiser_of_soft_dpo_is_the_lagrangian_policy() -> None:
    reward, beta = tensor(0.0, 1.0, -0.5), 0.4
    reference = torch.log_softmax(tensor(0.1, -0.3, 0.9), 0)
    optimum = torch.log_softmax(reference + reward / beta, 0).requires_grad_()
    loss = soft_dpo_loss(optimum - reference, preference_probability(reward), beta)
    assert torch.autograd.grad(loss, optimum)[0].abs().max() < 1e-12


@pytest.mark.parametrize(("margin", "expected"), [(0.0, LOG2), (2.0, nats(2.0)), (-800.0, 800.0), (800.0, 0.0)])
def test_bradley_terry_values(margin: float, expected: float) -> None:
    assert bradley_terry_loss(tensor(margin)).item() == pytest.approx(expected, abs=1e-12)


def test_flag_loss_values() -> None:
    score, sign = tensor(1.5, 1.5, 1.5), torch.tensor([1, -1, 0])
    assert flag_loss(score, sign).tolist() == pytest.approx([nats(1.5), nats(-1.5), 0.0])


@pytest.mark.parametrize(
    ("higher", "unsafe", "expected"),
    [
        (1, (-1, -1), nats(3.0)),  # a reward's label: the pair alone
        (0, (-1, -1), nats(-3.0)),
        (-1, (0, 1), nats(1.0) + nats(2.0)),  # flags alone
        (1, (0, 1), nats(3.0) + nats(1.0) + nats(2.0)),
        (1, (1, -1), nats(3.0) + nats(-1.0)),
        (-1, (-1, -1), 0.0),
    ],
)
def test_cost_loss_values(higher: int, unsafe: tuple[int, int], expected: float) -> None:
    loss = cost_loss(tensor(-1.0, 2.0), torch.tensor(higher), torch.tensor(unsafe))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_missing_labels_leave_no_gradient() -> None:
    scores = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    loss = cost_loss(scores, torch.tensor([-1, 1]), torch.tensor([[-1, -1], [-1, 0]])).sum()
    gradient = torch.autograd.grad(loss, scores)[0]
    assert gradient[0].abs().sum() == 0
    assert gradient[1].abs().min() > 0


def test_anchor_and_sft_values() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    assert anchor_loss(log_probs, weights).tolist() == pytest.approx([1.75, 3.0])
    assert sft_loss(log_probs[0], 6).item() == pytest.approx(0.5)


def test_gradients() -> None:
    torch.manual_seed(0)
    group = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 4, dtype=torch.float64)
    targets = preference_probability(torch.randn(2, 4, dtype=torch.float64))
    pair = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    higher, unsafe = torch.tensor([0, 1, -1]), torch.tensor([[0, 1], [-1, 1], [1, 1]])
    assert torch.autograd.gradcheck(lambda x: soft_dpo_loss(x, targets, 0.7), (group,))
    assert torch.autograd.gradcheck(lambda x: anchor_loss(x, weights), (group,))
    assert torch.autograd.gradcheck(lambda x: cost_loss(x, higher, unsafe), (pair,))
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x[:, 0], x[:, 1], tensor(0.1), tensor(-0.4), 0.7, 0.3), pair)

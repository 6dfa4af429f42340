"""PPO's pieces as pure functions: advantages, clipped losses, the Lagrangian mix, and the step on log λ.

Rows are responses, columns their tokens; a mask says which tokens are real. Schulman et al. 2017 (arXiv:1707.06347),
generalised advantages: arXiv:1506.02438, the Lagrangian: Safe RLHF, arXiv:2310.12773.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, decay: float) -> Tensor:
    """A_t = Σ_k (γ·decay)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t; V after a response's last token is 0.

    Args:
        rewards: of each token, [N, L].
        values: V before each token, [N, L].
        mask: [N, L] bool; the real tokens come first.
        gamma: discount, in (0, 1].
        decay: GAE's λ, in [0, 1]; 1 is the return minus the value.

    Returns:
        [N, L], 0 outside the mask.
    """
    mask = mask.to(values.dtype)
    after = torch.zeros_like(values)
    after[:, :-1] = values[:, 1:] * mask[:, 1:]
    deltas = (rewards + gamma * after - values) * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for place in reversed(range(values.shape[1])):
        running = deltas[:, place] + gamma * decay * running
        advantages[:, place] = running
    return advantages * mask


def lagrangian_advantages(reward: Tensor, costs: Tensor, lambda_: Tensor) -> Tensor:
    """(A_r − Σ_i λ_i A_c,i)/(1 + Σ_i λ_i), eq. 31 of Safe RLHF's appendix.

    Args:
        reward: [N, L].
        costs: [m, N, L].
        lambda_: [m], >= 0.
    """
    return (reward - torch.einsum("m,mnl->nl", lambda_, costs)) / (1 + lambda_.sum())


def clipped_policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """−E_t min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), ρ = π/π_old of each token.

    Args:
        log_probs, old, advantages: [N, L]; the last two without gradient.
        mask: [N, L] bool.
        clip: ε > 0.

    Returns:
        one number.
    """
    ratio = torch.exp(log_probs - old)
    worst = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(worst, mask)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """½ E_t max((V − R)², (clip(V, V_old ± ε) − R)²), arguments as in `clipped_policy_loss`."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens."""
    weights = mask.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp_min(1)


def next_log_lambda(log_lambda: float, cost: float, target: float, rate: float, lambda_max: float) -> float:
    """One SGD step on log λ for the loss −λ (E[c] − target): log λ + rate · λ · (E[c] − target), at most log λ_max.

    Args:
        log_lambda: where it is.
        cost: mean cost of recent episodes.
        target: what it should be at most.
        rate: > 0.
        lambda_max: largest λ.
    """
    moved = log_lambda + rate * math.exp(log_lambda) * (cost - target)
    return min(moved, math.log(lambda_max))

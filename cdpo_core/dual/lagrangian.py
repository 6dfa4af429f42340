"""The Lagrangian reward r_λ = r − λᵀc and what it decides: preference labels and importance weights.

With λ fixed, the constrained problem is an ordinary preference problem with reward r_λ, so the same
responses are only labelled anew for each λ: rewards, costs and reference log-probs are all reused
(arXiv:2403.02475). Pure functions of torch tensors.
"""

from __future__ import annotations

from typing import Literal

import torch

LabelMode = Literal["soft", "sampled", "hard"]


def lagrangian_reward(reward: torch.Tensor, costs: torch.Tensor, lambda_: torch.Tensor) -> torch.Tensor:
    """r_λ = r − λᵀc. The term +λᵀC is left out: it cancels inside a pair.

    Args:
        reward: [...] float.
        costs: [..., m] float, larger is more harmful.
        lambda_: [m] float, every entry >= 0 (units of reward per unit of cost).

    Returns:
        [...] float, in units of reward.

    Raises:
        ValueError: the shapes disagree, or a multiplier is negative or not finite.
    """
    if lambda_.dim() != 1 or costs.shape != (*reward.shape, lambda_.shape[0]):
        raise ValueError(
            f"reward {tuple(reward.shape)}, costs {tuple(costs.shape)} and lambda {tuple(lambda_.shape)} do not fit"
        )
    if not bool(torch.isfinite(lambda_).all() and (lambda_ >= 0).all()):
        raise ValueError(f"every lambda must be finite and >= 0, not {lambda_.tolist()}")
    return reward - costs @ lambda_.to(costs)


def preference_probability(r_lambda: torch.Tensor) -> torch.Tensor:
    """Bradley–Terry probability that each response beats each other: p[j, k] = σ(r_λ(y_j) − r_λ(y_k)).

    Args:
        r_lambda: [..., K] float.

    Returns:
        [..., K, K] float in (0, 1); p + pᵀ = 1, the diagonal is 0.5.
    """
    return torch.sigmoid(r_lambda.unsqueeze(-1) - r_lambda.unsqueeze(-2))


def relabel(r_lambda: torch.Tensor, mode: LabelMode, generator: torch.Generator | None = None) -> torch.Tensor:
    """Target probability of every ordered pair of a group under r_λ.

    `soft` is the Bradley–Terry probability itself, `sampled` draws one winner for each unordered
    pair (the paper's way; its expectation is `soft`), `hard` takes the larger r_λ (0.5 on a tie;
    biased: the DPO loss then has no finite minimiser).

    Args:
        r_lambda: [..., K] float.
        mode: the kind of label.
        generator: the random stream of `sampled`; the draw happens on its device, so that the
            labels do not depend on where the model runs. Not read by the other modes.

    Returns:
        [..., K, K] float, targets[j, k] = target probability that y_j beats y_k;
        targets + targetsᵀ = 1, the diagonal is 0.5.

    Raises:
        ValueError: unknown mode, or `sampled` without a generator.
    """
    probability = preference_probability(r_lambda)
    if mode == "soft":
        return probability
    if mode == "hard":
        return 0.5 + 0.5 * torch.sign(r_lambda.unsqueeze(-1) - r_lambda.unsqueeze(-2))
    if mode != "sampled":
        raise ValueError(f"unknown label mode {mode!r}")
    if generator is None:
        raise ValueError("sampled labels need a generator")
    draw = torch.rand(probability.shape, generator=generator, device=generator.device, dtype=torch.float64)
    upper = (draw.to(probability.device) < probability).to(probability.dtype).triu(diagonal=1)
    lower = (1 - upper).transpose(-1, -2).tril(diagonal=-1)
    return upper + lower + 0.5 * torch.eye(r_lambda.shape[-1], dtype=upper.dtype, device=upper.device)


def importance_weights(r_lambda: torch.Tensor, beta: float, log_ratio: torch.Tensor | None = None) -> torch.Tensor:
    """Weights that turn K samples into samples of π_λ ∝ π_ref exp(r_λ/β), normalised for each prompt.

    Args:
        r_lambda: [..., K] float, of samples drawn from the reference, or from q with `log_ratio`.
        beta: > 0, units of reward per nat.
        log_ratio: [..., K] float, log π_ref − log q of each sample (nats); None when q is the reference.

    Returns:
        [..., K] float, each row sums to 1.
    """
    logits = r_lambda / beta
    return torch.softmax(logits if log_ratio is None else logits + log_ratio, dim=-1)

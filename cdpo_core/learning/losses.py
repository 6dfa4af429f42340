"""The losses, as pure functions of scores and log-probabilities.

`log π` of a response is the sum over its tokens, in nats; probabilities and weights carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    p: Tensor | float = 1.0,
) -> Tensor:
    """Direct preference optimization: −p log σ(Δ) − (1 − p) log σ(−Δ).

    Δ = β[(log π/π_ref)(y_chosen) − (log π/π_ref)(y_rejected)]: eq. 7 of Rafailov et al. 2023
    (arXiv:2305.18290) at p = 1; at 0 < p < 1 its expectation over labels drawn with probability p.

    Args:
        policy_chosen: log π of the chosen responses, [...].
        policy_rejected: log π of the rejected responses, [...].
        ref_chosen: log π_ref of the chosen responses, [...].
        ref_rejected: log π_ref of the rejected responses, [...].
        beta: > 0, units of reward per nat.
        p: probability that the chosen response is the better one, [...] or one number.

    Returns:
        The loss of each pair, [...], nats.
    """
    delta = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    target = torch.as_tensor(p, dtype=delta.dtype, device=delta.device).expand_as(delta)
    return F.binary_cross_entropy_with_logits(delta, target, reduction="none")


def soft_dpo_loss(log_ratio: Tensor, target_probability: Tensor, beta: float) -> Tensor:
    """`dpo_loss` averaged over all K(K − 1)/2 unordered pairs of a group of responses to one prompt.

    Args:
        log_ratio: log π − log π_ref of each response, [..., K], K >= 2.
        target_probability: [..., K, K]; entry [j, k] is the probability that y_j beats y_k, the
            entries [j, k] and [k, j] add up to 1.
        beta: > 0, units of reward per nat.

    Returns:
        The mean loss of each group's pairs, [...], nats.
    """
    first, second = torch.triu_indices(log_ratio.shape[-1], log_ratio.shape[-1], 1, device=log_ratio.device)
    zero = log_ratio.new_zeros(())  # the reference is in the ratio already
    target = target_probability[..., first, second].to(log_ratio.dtype)
    return dpo_loss(log_ratio[..., first], log_ratio[..., second], zero, zero, beta, target).mean(-1)


def anchor_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Importance-weighted likelihood of reference samples: −Σ_j w_j log π(y_j).

    DPO fixes differences of log π only; this keeps the mass on text the reference writes. With
    w_j = softmax_j(r_λ,j/β) it is the cross-entropy from π_λ's estimate on those samples.

    Args:
        log_probs: log π of each response, [P, K].
        weights: [P, K], >= 0.

    Returns:
        The loss of each prompt, [P], nats.
    """
    return -(weights.to(log_probs.dtype) * log_probs).sum(-1)


def sft_loss(log_probs: Tensor, tokens: int | Tensor) -> Tensor:
    """Negative log-likelihood of demonstrations per response token, prompts not counted.

    Args:
        log_probs: log π of each response, [N].
        tokens: response tokens in all, EOS included.

    Returns:
        One number, nats per token.
    """
    return -log_probs.sum() / tokens


def bradley_terry_loss(margin: Tensor) -> Tensor:
    """−log σ(margin): the likelihood of the label "better" or "safer" under Bradley–Terry.

    Args:
        margin: score of the preferred minus score of the other (for costs: of the less safe minus
            of the safer one), in log-odds, [...].

    Returns:
        [...], nats.
    """
    return F.softplus(-margin)


def flag_loss(score: Tensor, sign: Tensor) -> Tensor:
    """−log σ(sign · score): the likelihood of a flag that says on which side of 0 a cost lies.

    Args:
        score: cost in log-odds, [...].
        sign: +1 unsafe, −1 safe, 0 unknown, [...].

    Returns:
        [...], nats; 0 where the flag is unknown.
    """
    return torch.where(sign == 0, 0.0, F.softplus(-sign.to(score.dtype) * score))


def cost_loss(scores: Tensor, higher: Tensor, unsafe: Tensor) -> Tensor:
    """The cost model's loss of Safe RLHF (arXiv:2310.12773): the pair's order and each response's flag.

    −log σ(c_less_safe − c_safer) − log σ(s_less_safe · c_less_safe) − log σ(s_safer · c_safer), with
    s = +1 unsafe and −1 safe; a missing label takes its term away. With no flags at all it is the
    reward model's Bradley–Terry loss.

    Args:
        scores: scores of a pair's two responses in log-odds, [..., 2].
        higher: which one the label says scores higher (the less safe one; for a reward the better
            one): 0, 1, or −1 unknown, [...].
        unsafe: flags of the two, 1 unsafe, 0 safe, −1 unknown, [..., 2].

    Returns:
        [...], nats.
    """
    margin = (scores[..., 1] - scores[..., 0]) * (2 * higher - 1).to(scores.dtype)
    order = torch.where(higher < 0, 0.0, bradley_terry_loss(margin))
    sign = torch.where(unsafe < 0, 0, 2 * unsafe - 1)
    return order + flag_loss(scores, sign).sum(-1)

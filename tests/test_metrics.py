from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from cdpo_core.dual.certificate import Foreseen
from cdpo_core.dual.selection import Candidate, select_round
from cdpo_core.dual.two_phase import NO_COVARIATE, Spread
from cdpo_core.evaluation.metrics import (
    cluster_mean,
    cluster_share,
    kl_divergence,
    paired_mean,
    prompt_means,
    safe_rate,
    win_rate,
    within_prompt_covariance,
)
from cdpo_core.randomness import numpy_stream


def test_prompt_means_are_in_the_order_of_the_ids() -> None:
    prompts, means = prompt_means(np.array([1.0, 5.0, 3.0]), np.array(["b", "a", "b"]))
    assert prompts.tolist() == ["a", "b"]
    assert means.tolist() == [5.0, 2.0]


def test_cluster_mean_counts_prompts_not_responses() -> None:
    estimate = cluster_mean(np.array([0.0, 0.0, 0.0, 4.0]), np.array([1, 1, 1, 2]))
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(stats.t.ppf(0.975, 1) * math.sqrt(8) / math.sqrt(2))
    # Copies of a response are no new prompts.
    values, ids = np.array([1.0, 2.0, 4.0]), np.array([0, 1, 2])
    repeated = cluster_mean(np.tile(values, 3), np.tile(ids, 3))
    assert repeated.half_width == pytest.approx(cluster_mean(values, ids).half_width)


def test_cluster_mean_covers() -> None:
    rng, ids = numpy_stream(0, "coverage"), np.repeat(np.arange(40), 4)
    covered = 0
    for _ in range(1000):
        values = np.repeat(rng.normal(size=40), 4) + rng.normal(size=160)
        estimate = cluster_mean(values, ids)
        covered += estimate.low <= 0 <= estimate.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_share_without_a_single_failure_still_has_an_interval() -> None:
    estimate = cluster_share(np.ones(80), np.repeat(np.arange(20), 4))
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(1 / (1 + 3.8415 / 20), abs=1e-4)


def test_share_of_independent_rows_is_wilsons() -> None:
    flags = np.array([1.0] * 30 + [0.0] * 70)
    estimate = cluster_share(flags, np.arange(100))
    wilson = stats.binomtest(30, 100).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == (pytest.approx(wilson.low, abs=2e-3), pytest.approx(wilson.high, abs=2e-3))
    clustered = cluster_share(np.repeat(flags, 4), np.repeat(np.arange(100), 4))
    assert clustered.half_width == pytest.approx(estimate.half_width, rel=0.02)


def test_safe_rate_needs_every_cost_at_or_below_zero() -> None:
    costs = np.array([[0.0, -1.0], [-1.0, 0.1], [2.0, -1.0], [-1.0, -1.0]])
    assert safe_rate(costs, np.arange(4)).mean == 0.5


def test_win_rate_compares_within_prompts_and_halves_ties() -> None:
    reward, ids = np.array([1.0, 3.0, 5.0, 9.0]), np.array(["a", "a", "b", "c"])
    rival, rival_ids = np.array([2.0, 2.0, 5.0]), np.array(["a", "a", "b"])
    assert win_rate(reward, ids, rival, rival_ids).mean == 0.5
    assert win_rate(reward + 1.5, ids, rival, rival_ids).mean == 1.0
    with pytest.raises(ValueError, match="share no prompt"):
        win_rate(reward, ids, rival, np.array(["x", "x", "y"]))


def test_kl_is_that_of_the_distributions() -> None:
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    drawn = numpy_stream(0, "kl").choice(3, size=40000, p=policy)
    estimate = kl_divergence(np.log(policy)[drawn], np.log(reference)[drawn], np.arange(40000) // 4)
    exact = float((policy * np.log(policy / reference)).sum())
    assert estimate.low <= exact <= estimate.high


def test_within_prompt_covariance_ignores_the_spread_between_prompts() -> None:
    rng = numpy_stream(0, "covariance")
    ids = np.repeat(np.arange(3000), 3)
    factor = np.array([[1.0, 0.0], [0.6, 0.8]])
    costs = np.repeat(rng.normal(0, 5, (3000, 2)), 3, axis=0) + rng.normal(size=(9000, 2)) @ factor.T
    np.testing.assert_allclose(within_prompt_covariance(costs, ids), factor @ factor.T, atol=0.06)


def test_within_prompt_covariance_is_unbiased_at_two_samples_and_skips_single_ones() -> None:
    costs = np.array([[0.0], [2.0], [7.0], [1.0], [1.0]])
    assert within_prompt_covariance(costs, np.array([0, 0, 1, 2, 2])).item() == 1.0  # (2 + 0) / 2
    with pytest.raises(ValueError, match="two responses"):
        within_prompt_covariance(costs, np.arange(5))


def test_paired_mean_equals_the_plain_mean_where_the_reference_says_nothing() -> None:
    costs = np.array([1.0, 2.0, 4.0, 8.0, 1.0])
    plain = cluster_mean(costs, np.arange(5))
    assert paired_mean(costs, np.ones(5), 1.0) == plain


def test_paired_mean_is_exact_where_the_reference_says_all() -> None:
    reference = np.array([1.0, 2.0, 4.0, 8.0, 1.0])
    estimate = paired_mean(0.5 * reference - 2, reference, 3.0)
    assert estimate.mean == pytest.approx(-0.5)
    assert estimate.half_width == pytest.approx(0, abs=1e-7)


def test_paired_mean_is_unbiased_covers_and_is_narrower() -> None:
    rng, covered, narrower, means = numpy_stream(0, "paired"), 0, [], []
    for _ in range(1000):
        difficulty = rng.normal(0, 2.2, 200)
        reference = difficulty + rng.normal(0, 0.5, 200)
        policy = 0.8 * difficulty - 1 + rng.normal(0, 0.7, 200)
        estimate = paired_mean(policy, reference, 0.0)
        means.append(estimate.mean)
        covered += estimate.low <= -1 <= estimate.high
        narrower.append(estimate.half_width / cluster_mean(policy, np.arange(200)).half_width)
    assert np.mean(means) == pytest.approx(-1, abs=0.01)
    assert 0.93 <= covered / 1000 <= 0.97
    assert np.mean(narrower) < 0.55


def test_paired_mean_corrects_an_unlucky_draw_of_prompts() -> None:
    rng = numpy_stream(0, "unlucky")
    population = rng.normal(0, 2.2, 1500)
    chosen = np.sort(population)[500:700]  # easier prompts than most
    policy = population * 0.8 - 1
    drawn = chosen * 0.8 - 1 + rng.normal(0, 0.3, 200)
    estimate = paired_mean(drawn, chosen, population.mean())
    assert abs(drawn.mean() - policy.mean()) > 0.3
    assert abs(estimate.mean - policy.mean()) < 0.15


@pytest.mark.parametrize("values", [np.array([1.0, math.nan]), np.array([])])
def test_unusable_values_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite"):
        cluster_mean(values, np.arange(len(values)))


def test_one_prompt_leaves_no_interval() -> None:
    with pytest.raises(ValueError, match="two prompts"):
        cluster_mean(np.ones(4), np.zeros(4))


def candidate(reward: float, *costs: float) -> Candidate:
    return Candidate(reward, costs, tuple(foreseen(0.165) for _ in costs))


def foreseen(half_width: float) -> Foreseen:
    return Foreseen(NO_COVARIATE, Spread(2.0, 2.0), 10.0, half_width)


# At 400 prompts, sd 2 and δ = 0.05 the certificate's half-width is 0.165.
@pytest.mark.parametrize(
    ("candidates", "limits", "chosen"),
    [
        ([candidate(1.0, -0.3), candidate(2.0, -0.2), candidate(3.0, -0.1)], (0.0,), 1),
        ([candidate(1.0, -0.1), candidate(2.0, 0.3), candidate(3.0, -0.15)], (0.0,), 2),
        ([candidate(1.0, 0.5), candidate(0.5, 0.2)], (0.0,), 1),
        ([candidate(1.0, -0.3), candidate(1.0, -0.4)], (0.0,), 0),
        ([candidate(3.0, -0.5, 0.9), candidate(1.0, -0.3, 0.5)], (0.0, 1.0), 1),
        ([candidate(3.0, -0.5, 2.0), candidate(1.0, 0.4, 0.5)], (0.0, 1.0), 1),
    ],
)
def test_choice_of_policy(candidates: list[Candidate], limits: tuple[float, ...], chosen: int) -> None:
    assert select_round(candidates, limits) == chosen


def test_a_round_on_target_goes_first() -> None:
    rounds = [candidate(2.0, -0.2), replace(candidate(1.0, -0.3), met=True), candidate(3.0, -0.25)]
    assert select_round(rounds, (0.0,)) == 1


def test_choice_goes_by_the_foreseen_bound() -> None:
    rounds = [candidate(1.0, -0.4), candidate(2.0, -0.2)]
    assert rounds[1].upper == (pytest.approx(-0.035),)
    assert select_round(rounds, (0.0,)) == 1
    assert select_round([replace(item, foreseen=(foreseen(0.3),)) for item in rounds], (0.0,)) == 0
    with pytest.raises(ValueError, match="no round"):
        select_round([], (0.0,))

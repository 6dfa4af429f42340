"""How often the certificate errs and how often it passes, about the population that prompts come from.

    python benchmarks/certificate_calibration.py [--tests 4000] [--worlds 12] [--json FILE]

Each test draws a pool of prompts from a population, splits it as a run does, and certifies a policy whose mean cost
over the *population* lies at the limit: with the default (`bounded`), with `t` where it is offered, and with the former
default (`t` within strata cut from the drawn pool, which takes the pool's mean for the population's). A policy at the
limit must pass in at most δ of all tests; with N tests the rate seen may lie 2√(δ(1 − δ)/N) above it. Beside it the
power: how often a policy passes that lies as far below as Student's test on the same prompts would need for 90 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import stats

from cdpo_core.config import DataConfig, TestbedConfig
from cdpo_core.data.splits import alike_order, pool_sizes, spread
from cdpo_core.dual.bounds import betting_passes, student_upper_bound
from cdpo_core.dual.certificate import Foreseen, foresee, student_applies
from cdpo_core.dual.two_phase import Pool, two_phase_costs
from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed.annotators import draw_prompts, part_indices
from cdpo_core.testbed.calibration import calibrate
from cdpo_core.testbed.oracle import tilted
from cdpo_core.testbed.world import draw

DELTAS = (0.05, 0.1)
COUNTS = (20, 50, 200, 800)
SAMPLES, REFERENCE_SAMPLES = 16, 8
LAMBDAS = (0.3, 0.7, 1.1, 1.6, 2.6)
SPLITS = DataConfig().splits
POWER = 0.9


@dataclass(frozen=True)
class Costs:
    """The policy's and the reference's mean costs of a pool's prompts [N]; the population's mean of the former is 0."""

    policy: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Kind:
    """A population of prompts: what draws a pool, and the end of the costs' range (from the limit 0)."""

    draw: Callable[[np.random.Generator, int], Costs]
    high: float


def _between_and_within(correlation: float) -> Callable[[np.random.Generator, int], Costs]:
    def drawn(rng: np.random.Generator, count: int) -> Costs:
        level, other, *within = rng.normal(size=(4, count))
        policy = 2 * (correlation * level + math.sqrt(1 - correlation**2) * other) + within[0]
        return Costs(np.minimum(policy, 10.0), 2 * level + within[1])

    return drawn


def _harmful(rng: np.random.Generator, count: int) -> Costs:
    """12 % of the prompts are harmful, for both."""
    base = np.where(rng.random(count) < 0.12, 4.0, -4 * 0.12 / 0.88)
    return Costs(base + 0.5 * rng.normal(size=count), base + 0.5 * rng.normal(size=count))


def _flags(share: float) -> Callable[[np.random.Generator, int], Costs]:
    def drawn(rng: np.random.Generator, count: int) -> Costs:
        return Costs((rng.random(count) < share) - share, (rng.random(count) < share) - share)

    return drawn


def _rare(rng: np.random.Generator, count: int) -> Costs:
    """1 % of the prompts at +9, which nothing of the reference tells."""
    return Costs(np.where(rng.random(count) < 0.01, 9.0, -0.09 / 0.99), rng.normal(size=count))


def _lognormal(rng: np.random.Generator, count: int) -> Costs:
    """Beyond 10 costs are cut, and their mean is that of what is left."""
    cut, sigma = math.log(10 + LOGNORMAL_MEAN), 1.0
    return Costs(
        np.minimum(np.exp(sigma * rng.normal(size=count)), math.exp(cut)) - LOGNORMAL_MEAN, rng.normal(size=count)
    )


def _lognormal_mean() -> float:
    """E[min(X, m + 10)] = m of a standard lognormal X, by iteration."""
    mean = math.exp(0.5)
    for _ in range(100):
        cut = mean + 10
        below = math.exp(0.5) * stats.norm.cdf(math.log(cut) - 1)
        mean = float(below + cut * stats.norm.sf(math.log(cut)))
    return mean


LOGNORMAL_MEAN = _lognormal_mean()


def _discrete(rng: np.random.Generator, count: int) -> Costs:
    values, shares = [-1.0, 0.0, 2.0], [0.5, 0.25, 0.25]
    return Costs(rng.choice(values, count, p=shares), rng.choice(values, count, p=shares))


KINDS: dict[str, Kind] = {
    "normal 2/1, correlation 0": Kind(_between_and_within(0.0), 10.0),
    "normal 2/1, correlation .8": Kind(_between_and_within(0.8), 10.0),
    "normal 2/1, correlation 1": Kind(_between_and_within(1.0), 10.0),
    "12 % harmful": Kind(_harmful, 8.0),
    "flag, p = .02": Kind(_flags(0.02), 0.98),
    "flag, p = .1": Kind(_flags(0.1), 0.9),
    "1 % at +9": Kind(_rare, 9.0),
    "lognormal": Kind(_lognormal, 10.0),
    "discrete": Kind(_discrete, 2.0),
}


@dataclass(frozen=True)
class Rate:
    """One cell of the table.

    Attributes:
        what: the population.
        prompts: n, tested.
        delta: level of the test.
        tests: how many were made.
        former: share that the former default passes at the limit.
        student: share that `t` passes at the limit, refused ones not passing.
        offered: share of the tests in which `t` is offered.
        default: share that the default passes at the limit.
        power: share that the default passes where Student's test on the same costs is planned to pass 90 %.
        former_power: of the former default there.
    """

    what: str
    prompts: int
    delta: float
    tests: int
    former: float
    student: float
    offered: float
    default: float
    power: float
    former_power: float

    @property
    def most(self) -> float:
        """Largest share of false passes that is in order."""
        return allowed(self.delta, self.tests)

    @property
    def holds(self) -> bool:
        """Whether the default and `t` keep their level."""
        return max(self.default, self.student) <= self.most


def allowed(delta: float, tests: int) -> float:
    """Largest share of false passes that N tests may show."""
    return delta + 2 * math.sqrt(delta * (1 - delta) / tests)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 0 when every error rate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=4000)
    parser.add_argument("--worlds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    print("False passes at the limit (truth: the population's mean), and power where Student's is planned to be .9\n")
    print(f"{'population':28} {'n':>4} {'δ':>5} {'≤':>6}  {'former':>6} {'t':>6} {'offered':>7} {'default':>7}  power")
    rates = []
    for rate in [*simulated(options.tests), *on_testbed(options.tests, options.worlds)]:
        sign = "" if rate.holds else "  FAIL"
        print(
            f"{rate.what:28} {rate.prompts:4} {rate.delta:5g} {rate.most:6.4f}  {rate.former:6.4f} {rate.student:6.4f} "
            f"{rate.offered:7.2f} {rate.default:7.4f}  {rate.power:.3f} (former {rate.former_power:.3f}){sign}",
            flush=True,
        )
        rates.append(rate)
    if options.json:
        options.json.write_text(json.dumps([asdict(rate) for rate in rates], indent=1, ensure_ascii=False) + "\n")
    return 0 if all(rate.holds for rate in rates) else 1


def simulated(tests: int, counts: Sequence[int] = COUNTS, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Rate]:
    """The populations of `KINDS`, at every n."""
    for what in kinds:
        for count in counts:
            rng = numpy_stream(0, "certificate", what, count)
            yield from _rates(what, count, [_drawn(KINDS[what], rng, count) for _ in range(tests)])


@dataclass(frozen=True)
class _Test:
    """One test's costs: two-phase ones [n] with their range's end, and what the former default saw."""

    values: np.ndarray
    high: float
    foreseen: float
    plain: np.ndarray
    strata: np.ndarray


def _rates(what: str, count: int, tests: Sequence[_Test]) -> Iterator[Rate]:
    """The cells of one population and n; all costs have the mean 0 over the population."""
    values = np.stack([test.values for test in tests])
    high, foreseen = (np.array([getattr(test, name) for test in tests]) for name in ("high", "foreseen"))
    spread_of_means = float(values.mean(1).std(ddof=1))
    offered = np.array([student_applies(row.std(ddof=1), count, end) for row, end in zip(values, high, strict=True)])
    for delta in DELTAS:
        quantile = float(stats.t.ppf(1 - delta, count - 1))
        below = (quantile + float(stats.norm.ppf(POWER))) * max(spread_of_means, 1e-9)
        student = np.array([student_upper_bound(row, delta) <= 0 for row in values])
        former = np.array([former_upper_bound(test.plain, test.strata, delta) for test in tests])
        yield Rate(
            what,
            count,
            delta,
            len(tests),
            former=float((former <= 0).mean()),
            student=float((student & offered).mean()),
            offered=float(offered.mean()),
            default=float(betting_passes(values, 0.0, delta, high, foreseen).mean()),
            power=float(betting_passes(values - below, 0.0, delta, high, foreseen).mean()),
            former_power=float((former - below <= 0).mean()),
        )


def former_upper_bound(costs: np.ndarray, strata: np.ndarray, delta: float) -> float:
    """What was the default: Student's bound on the deviation within strata cut from the drawn pool."""
    groups = [costs[strata == name] for name in np.unique(strata)]
    parts = [len(group) / len(costs) * float(group.var(ddof=1)) for group in groups]
    variance = sum(parts)
    if variance == 0:
        return float(costs.mean())
    freedom = variance**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    means = np.array([group.mean() for group in groups])[np.unique(strata, return_inverse=True)[1]]
    spread_, third = float(((costs - means) ** 2).mean()), float(((costs - means) ** 3).mean())
    quantile = float(stats.t.ppf(1 - delta, freedom))
    quantile += max(third / spread_**1.5, 0.0) * (2 * quantile**2 + 1) / (6 * math.sqrt(len(costs)))
    return float(costs.mean()) + quantile * math.sqrt(variance / len(costs))


def _drawn(kind: Kind, rng: np.random.Generator, count: int) -> _Test:
    """A pool from the population, split as a run splits it (without choosing among draws), and its test."""
    pool = round(count * (1 - SPLITS.preferences) / SPLITS.certificate)
    costs = kind.draw(rng, pool)
    split = _split(costs.reference, rng)
    return _tested(costs, split, kind.high)


def _split(reference: np.ndarray, rng: np.random.Generator, kinds: np.ndarray | None = None) -> np.ndarray:
    """The pool's parts, spread over the reference's cost."""
    labels = np.zeros(len(reference), dtype=int) if kinds is None else kinds
    return spread(alike_order(labels, reference[:, None]), pool_sizes(len(reference), SPLITS), rng)


def _tested(costs: Costs, split: np.ndarray, high: float, sampled: np.ndarray | None = None) -> _Test:
    """What the certificate sees of a pool; `sampled` are the policy's measured costs, where they are not `costs`."""
    seen = costs.policy if sampled is None else sampled
    held, selection = split == "certificate", split == "selection"
    found: Foreseen = foresee(
        seen[selection], costs.reference[selection], costs.reference, int(held.sum()), 0.0, 0.05, "bounded", high=high
    )
    pool = Pool(costs.reference[held], costs.reference[~held], found.covariate)
    values, above = two_phase_costs(seen[held], pool)
    groups = int(np.clip(held.sum() // 10, 1, 20))
    borders = np.quantile(costs.reference, np.arange(1, groups) / groups)
    strata = np.digitize(costs.reference[held], borders)
    if np.unique(strata, return_counts=True)[1].min() < 2:
        strata = np.zeros(int(held.sum()), dtype=int)
    return _Test(values, high + above, max(found.spread.sd, 1e-9), seen[held], strata)


def on_testbed(tests: int, worlds: int, counts: Sequence[int] = COUNTS) -> Iterator[Rate]:
    """Exact tilted policies of the testbed's worlds; each pool is drawn from the world's prompts, with replacement."""
    for count in counts:
        rng = numpy_stream(0, "certificate", "testbed", count)
        yield from _rates(f"testbed, {worlds} worlds", count, [_on_world(rng, count, worlds) for _ in range(tests)])


@cache
def _world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(log π_ref [P, Y], rewards [P, Y], costs [P, Y, 1], kinds [P]) of a calibrated world's pool prompts."""
    testbed, data = TestbedConfig(), DataConfig()
    prompts = draw_prompts(seed, testbed.prompts, data.splits.preferences, data.held_out)
    pool = prompts[prompts["split"] == "pool"].sort_values("prompt_id")
    units = {"beta": testbed.calibrated_beta, "limit": testbed.calibrated_limit, "sharpness": testbed.sharpness}
    world = calibrate(seed, **units, pool=part_indices(pool))
    names = pool["prompt_id"].tolist()
    reward, costs = world.true_scores(names)
    return world.demonstrator_log_probs_of(names), reward, costs, pool["kind"].to_numpy()


@cache
def _policy(seed: int, lambda_: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(log π_λ [P, Y], its mean costs [P], over all prompts)."""
    log_ref, reward, costs, _ = _world(seed)
    policy = tilted(log_ref, reward, costs, np.array([lambda_]), 1.0)
    means = (np.exp(policy) * costs[..., 0]).sum(1)
    return policy, means, float(means.mean())


def _on_world(rng: np.random.Generator, count: int, worlds: int) -> _Test:
    """The world's prompts are the population: its mean is exact, and a pool is drawn from them anew."""
    seed, lambda_ = int(rng.integers(worlds)), float(rng.choice(LAMBDAS))
    log_ref, _, costs, kinds = _world(seed)
    policy, means, true = _policy(seed, lambda_)
    size = round(count * (1 - SPLITS.preferences) / SPLITS.certificate)
    pool = rng.integers(len(means), size=size)
    rows = pool[:, None]
    reference = costs[rows, draw(log_ref[pool], REFERENCE_SAMPLES, rng), 0].mean(1) - true
    split = _split(reference, rng, kinds[pool])
    sampled = means[pool] - true
    needed = np.flatnonzero((split == "certificate") | (split == "selection"))
    sampled[needed] = costs[pool[needed, None], draw(policy[pool[needed]], SAMPLES, rng), 0].mean(1) - true
    return _tested(Costs(sampled, reference), split, float(costs.max()) - true)


if __name__ == "__main__":
    sys.exit(main())

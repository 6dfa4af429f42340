"""How often the certificate errs and how often it passes: by simulation, and on the testbed's exact costs.

    python benchmarks/certificate_calibration.py [--tests 2000] [--worlds 12] [--json FILE]

A test whose true mean cost lies at the limit, or above it, must pass in at most δ of all tests; with N tests the rate
seen may lie 2√(δ(1 − δ)/N) above it. Minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cdpo_core.config import ExperimentConfig
from cdpo_core.data.splits import POOL_SPLITS, balanced_splits, pool_sizes
from cdpo_core.dual.certificate import Method, certify, cost_strata, planned_margin, prompt_spread
from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed.annotators import draw_prompts, part_indices
from cdpo_core.testbed.calibration import calibrate
from cdpo_core.testbed.oracle import tilted
from cdpo_core.testbed.world import World, draw

DELTAS = (0.05, 0.1)
SAMPLES, REFERENCE_SAMPLES = 16, 8
LAMBDAS = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 2.6, 3.4)
# How far above the limit a policy's true mean cost lies.
EXCESSES = (0.0, 0.02, 0.05)
RARE, LARGE = 0.02, 20.0


@dataclass(frozen=True)
class Rate:
    """How often a kind of test passed.

    Attributes:
        what: the test.
        delta: its level.
        passed: share of tests that passed.
        most: largest share that is in order, or for a power the planned share.
        tests: how many.
        is_power: whether passing is right.
    """

    what: str
    delta: float
    passed: float
    most: float
    tests: int
    is_power: bool = False

    @property
    def holds(self) -> bool:
        """Whether the rate is in order; a power is only reported."""
        return self.is_power or self.passed <= self.most


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 0 when every error rate holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--worlds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rates = []
    for rate in [*simulated(options.tests), *on_testbed(options.worlds)]:
        sign = "    " if rate.is_power else " ok " if rate.holds else "FAIL"
        print(
            f"{sign} {rate.passed:7.4f} (≤ {rate.most:.4f}) δ = {rate.delta:g}, {rate.tests} tests: {rate.what}",
            flush=True,
        )
        rates.append(rate)
    if options.json:
        options.json.write_text(json.dumps([asdict(rate) for rate in rates], indent=1, ensure_ascii=False) + "\n")
    return 0 if all(rate.holds for rate in rates) else 1


def allowed(delta: float, tests: int) -> float:
    """Largest share of false passes that N tests may show."""
    return delta + 2 * math.sqrt(delta * (1 - delta) / tests)


def simulated(tests: int) -> Iterator[Rate]:
    """Tests of costs drawn with a true mean at the limit, 0."""
    for name, drawn in COSTS.items():
        for count in (400, 800):
            yield from _rates(f"t, n = {count}, {name} costs", drawn, count, "t", tests, low=-10.0, high=15.0)
        for count in (20, 50, 100, 400):
            yield from _rates(
                f"bounded, n = {count}, {name} costs", drawn, count, "bounded", tests, low=-10.0, high=15.0
            )
    for count in (20, 50, 100, 400):
        yield from _rates(f"bounded, n = {count}, rare large harm", rare, count, "bounded", tests, low=-5.0, high=25.0)


def normal(generator: np.random.Generator, count: int) -> np.ndarray:
    """Prompts' mean costs with a deviation of 2.2, as on the testbed."""
    return 2.2 * generator.standard_normal(count)


def skewed(generator: np.random.Generator, count: int) -> np.ndarray:
    """A few prompts cost much: a gamma distribution of skewness 1.4."""
    return 1.5 * (generator.gamma(2.0, 1.0, count) - 2.0)


def skewed_down(generator: np.random.Generator, count: int) -> np.ndarray:
    """A few prompts cost very little."""
    return -skewed(generator, count)


def heavy_tailed(generator: np.random.Generator, count: int) -> np.ndarray:
    """Extreme prompts on both sides: Student's distribution with 4 degrees of freedom, which has no kurtosis."""
    return 1.5 * generator.standard_t(4, count)


def clustered(generator: np.random.Generator, count: int) -> np.ndarray:
    """Means of two responses each to prompts of three kinds, harmless, borderline and harmful."""
    kinds = generator.choice([-3.0, 0.5, 3.0], size=count, p=[0.5, 0.0 + 0.1, 0.4]) + 0.25
    prompts = kinds + generator.standard_normal(count)
    return prompts + generator.standard_normal((2, count)).mean(0)


def rare(generator: np.random.Generator, count: int) -> np.ndarray:
    """2 % of prompts at +20, the others so far below that the mean is 0."""
    return np.where(generator.random(count) < RARE, LARGE, -RARE * LARGE / (1 - RARE))


COSTS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": normal,
    "skewed": skewed,
    "skewed down": skewed_down,
    "heavy-tailed": heavy_tailed,
    "clustered": clustered,
}


def _rates(
    what: str,
    drawn: Callable[[np.random.Generator, int], np.ndarray],
    count: int,
    method: Method,
    tests: int,
    *,
    low: float,
    high: float,
) -> Iterator[Rate]:
    generator = numpy_stream(0, "certificate", what)
    costs = [np.clip(drawn(generator, count), None, high) for _ in range(tests)]
    for delta in DELTAS:
        passed = sum(certify(row, 0.0, delta, method, low=low, high=high).passed for row in costs)
        yield Rate(what, delta, passed / tests, allowed(delta, tests), tests)


def on_testbed(worlds: int) -> Iterator[Rate]:
    """Exact tilted policies at and above their limit, split, sampled and certified as the pipeline does it."""
    tests = [test for seed in range(worlds) for test in _world_tests(seed)]
    for delta in DELTAS:
        for excess in EXCESSES:
            passed = [test.passes(test.true - excess, delta) for test in tests]
            what = f"testbed, {len(tests)} policies of {worlds} worlds, true cost {excess:g} above the limit"
            yield Rate(what, delta, float(np.mean(passed)), allowed(delta, len(tests)), len(tests))
        planned = [test.passes(test.true + test.margin(delta), delta) for test in tests]
        what = "testbed, power at the planned margin (90 % planned)"
        yield Rate(what, delta, float(np.mean(planned)), 0.9, len(tests), is_power=True)


@dataclass(frozen=True)
class _Test:
    """One policy's certificate prompts: sampled mean costs, strata, and its true mean over all prompts."""

    costs: np.ndarray
    strata: np.ndarray | None
    true: float

    def passes(self, limit: float, delta: float) -> bool:
        return certify(self.costs, limit, delta, "t", strata=self.strata).passed

    def margin(self, delta: float) -> float:
        sd = prompt_spread(self.costs, self.strata)[0]
        return planned_margin(sd, len(self.costs), delta, 0.9)


def _world_tests(seed: int) -> Iterator[_Test]:
    world, names, kinds = _world(seed)
    reward, costs = world.true_scores(names)
    log_ref = world.demonstrator_log_probs_of(names)
    generator = numpy_stream(seed, "certificate calibration")
    rows = np.arange(len(names))[:, None]
    sizes = pool_sizes(len(names), ExperimentConfig().data.splits)
    for number, value in enumerate(LAMBDAS):
        # Each policy has splits of its own, as each experiment has.
        reference = costs[rows, draw(log_ref, REFERENCE_SAMPLES, generator), 0].mean(1)
        split = balanced_splits(kinds, reference[:, None], dict.fromkeys(POOL_SPLITS, 0) | sizes, 1000 * seed + number)
        held = np.flatnonzero(split == "certificate")
        policy = tilted(log_ref, reward, costs, np.array([value]), 1.0)
        true = float((np.exp(policy) * costs[..., 0]).sum(1).mean())
        drawn = costs[held[:, None], draw(policy[held], SAMPLES, generator), 0].mean(1)
        chosen = [names[place] for place in held]
        yield _Test(drawn, cost_strata(chosen, names, kinds.tolist(), reference), true)


def _world(seed: int) -> tuple[World, list[str], np.ndarray]:
    """A calibrated world with the names and kinds of its pool's prompts."""
    config = ExperimentConfig()
    testbed, data = config.testbed, config.data
    prompts = draw_prompts(seed, testbed.prompts, data.splits.preferences, data.held_out)
    pool = prompts[prompts["split"] == "pool"].sort_values("prompt_id")
    units = {"beta": testbed.calibrated_beta, "limit": testbed.calibrated_limit, "sharpness": testbed.sharpness}
    world = calibrate(seed, **units, pool=part_indices(pool))
    return world, pool["prompt_id"].tolist(), pool["kind"].to_numpy()


if __name__ == "__main__":
    sys.exit(main())

"""Rows 12 to 15: how near the exact optimum, over ten worlds and three limits; λ's behaviour; limits out of reach."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Any

from acceptance.lab import Lab
from acceptance.row import Row

SEEDS = range(10)
LIMITS = ("loose", "middle", "tight")
ORACLE_MEDIAN, ORACLE_WORST, SUPPORT, ORACLE_KEPT = 0.985, 0.96, 0.995, 28
LEARNED_MEDIAN, SCORER_CEILING, LEARNED_KEPT, LEARNED_CERTIFIED = 0.985, 0.90, 28, 27
ROUNDS, FLIPS = 2, 2
BELOW_FLOOR = 0.1

Record = Mapping[str, Any]


def near_optimum_oracle(lab: Lab) -> Row:
    """Row 12: the truth as scorers."""
    children = [child for seed in SEEDS for child in sweep(lab, seed, "oracle")]
    shares = [_share(child, "captured_ceiling") for child in children]
    support = min(child["oracle"]["support_mass"] or 0.0 for child in children)
    kept, rounds = sum(map(_keeps, children)), [len(child["rounds"]) for child in children]
    return Row(
        12,
        f"truth as scorers, {len(SEEDS)} worlds × {len(LIMITS)} limits",
        f"captured / captured_ceiling: median {median(shares):.3f}, least {min(shares):.3f}; "
        f"support_mass ≥ {support:.4f}; "
        f"true cost ≤ limit in {kept} of {len(children)}; certified {_certified(children)}; rounds: median "
        f"{median(rounds):g}, most {max(rounds)}",
        f"median ≥ {ORACLE_MEDIAN}, least ≥ {ORACLE_WORST}; support_mass ≥ {SUPPORT}; ≥ {ORACLE_KEPT} of 30; "
        f"rounds: median ≤ {ROUNDS}",
        median(shares) >= ORACLE_MEDIAN
        and min(shares) >= ORACLE_WORST
        and support >= SUPPORT
        and kept >= ORACLE_KEPT
        and median(rounds) <= ROUNDS,
    )


def near_optimum_learned(lab: Lab) -> Row:
    """Row 13: learned scorers."""
    children = [child for seed in SEEDS for child in sweep(lab, seed, "learned")]
    shares = [_share(child, "certified_scorer_ceiling") for child in children]
    apart = [_share(child, "captured_ceiling", "scorer_ceiling") for child in children]
    ceilings = [child["oracle"]["scorer_ceiling"] or 0.0 for child in children]
    missed = [child for child in children if not _keeps(child)]
    kept = len(children) - len(missed)
    unexplained = sum(not _explained(child) for child in missed)
    return Row(
        13,
        f"learned scorers, {len(SEEDS)} worlds × {len(LIMITS)} limits",
        f"captured / certified_scorer_ceiling: median {median(shares):.3f}, least {min(shares):.3f}; "
        f"/ min(captured_ceiling, scorer_ceiling): median {median(apart):.3f}, least {min(apart):.3f}; "
        f"scorer_ceiling: median {median(ceilings):.3f}; true cost ≤ limit in {kept} of {len(children)}, of the others "
        f"{unexplained} by more than the calibration error shown; certified {_certified(children)}",
        f"median ≥ {LEARNED_MEDIAN}; scorer_ceiling: median ≥ {SCORER_CEILING}; ≥ {LEARNED_KEPT} of 30, the others "
        f"explained; certified ≥ {LEARNED_CERTIFIED}",
        median(shares) >= LEARNED_MEDIAN
        and median(ceilings) >= SCORER_CEILING
        and kept >= LEARNED_KEPT
        and sum(child["status"] == "certified" for child in children) >= LEARNED_CERTIFIED
        and unexplained == 0,
    )


def lambda_behaves(lab: Lab) -> Row:
    """Row 14: λ neither oscillates nor runs away, in any run of the two rows before."""
    children = [child for mode in ("oracle", "learned") for seed in SEEDS for child in sweep(lab, seed, mode)]
    flips = [sign_flips(child) for child in children]
    widened = sum(bracket_widens(child) for child in children)
    return Row(
        14,
        f"λ in these {len(children)} runs",
        f"the violation's sign flips at most {max(flips)} times; brackets that widened: {widened}",
        f"≤ {FLIPS} flips; 0 widened",
        max(flips) <= FLIPS and widened == 0,
    )


def infeasible(lab: Lab) -> Row:
    """Row 15: limits below the exact floor, and no false alarm at the tight limit."""
    below, alarms = 0, 0
    for seed in SEEDS:
        floor = placed(lab, seed)["floor"]
        words = ["run", "testbed", *_seeds(seed), "--testbed.scorers", "oracle", "--limit", f"{floor - BELOW_FLOOR:g}"]
        ran = lab.run(f"infeasible-{seed}", words, home_of(seed))
        lowest = (ran.result.get("reachable") or {}).get("floor")
        below += ran.code == 3 and ran.result.get("status") == "infeasible" and lowest is not None
        alarms += sweep(lab, seed, "oracle")[-1]["status"] == "infeasible"
    return Row(
        15,
        f"limits {BELOW_FLOOR:g} below the exact floor, {len(SEEDS)} worlds; and the tight limit there",
        f"infeasible with the lowest reachable cost, exit 3, in {below}; false alarms at the tight limit: {alarms}",
        f"{len(SEEDS)} of {len(SEEDS)}; 0",
        below == len(SEEDS) and alarms == 0,
    )


def sweep(lab: Lab, seed: int, mode: str) -> list[dict[str, Any]]:
    """The three limits of one world, loosest first: one result record each."""
    limits = placed(lab, seed)
    words = ["sweep", "testbed", "--seeds", str(seed), "--testbed.seed", str(seed), "--testbed.scorers", mode]
    listed = ",".join(f"{limits[name]:g}" for name in LIMITS)
    ran = lab.run(f"three-{mode}-{seed}", [*words, "--limits", listed], home_of(seed))
    return sorted(ran.result["children"], key=lambda child: -child["limit"])


def placed(lab: Lab, seed: int) -> dict[str, float]:
    """Where the limits of a world lie, exact: loose, middle, tight and the floor."""
    return lab.once(f"limits-{seed}", lambda: _placed(seed))


@cache
def _placed(seed: int) -> dict[str, float]:
    from cdpo_core.config_loading import load_config
    from cdpo_core.testbed.annotators import draw_prompts, part_indices
    from cdpo_core.testbed.calibration import calibrate
    from cdpo_core.testbed.limits import placed_limits

    config = load_config("testbed")
    testbed, data = config.testbed, config.data
    prompts = draw_prompts(seed, testbed.prompts, data.splits.preferences, data.held_out)
    pool = prompts[prompts["split"] == "pool"]
    units = {"beta": testbed.calibrated_beta, "limit": testbed.calibrated_limit, "sharpness": testbed.sharpness}
    world = calibrate(seed, **units, pool=part_indices(pool))
    names = pool["prompt_id"].tolist()
    limits = {name: values[0] for name, values in placed_limits(world, names, config.dpo.beta).items()}
    floor = sum(float(world.true_scores([name])[1].min()) for name in names) / len(names)
    return {**limits, "floor": round(floor, 4)}


def sign_flips(child: Record) -> int:
    """How often the violation changes its sign from round to round, against the target that training aimed at."""
    misses = [item["cost"] - child["target"][0] for item in child["rounds"]]
    return sum(before * after < 0 for before, after in pairwise(misses))


def bracket_widens(child: Record) -> bool:
    """Whether a round's λ lies outside what the rounds before it left."""
    low, high = 0.0, float("inf")
    for item in child["rounds"]:
        if not low <= item["lambda"] <= high:
            return True
        miss, half = item["cost"] - child["target"][0], item["cost_half_width"]
        low = max(low, item["lambda"]) if miss > half else low
        high = min(high, item["lambda"]) if miss < -half else high
    return False


def home_of(seed: int) -> str:
    """The state folder of a world's runs."""
    return f"world-{seed}"


def _seeds(seed: int) -> list[str]:
    return ["--seed", str(seed), "--testbed.seed", str(seed)]


def _keeps(child: Record) -> bool:
    cost = child["oracle"].get("true_cost")
    return cost is not None and cost <= child["limit"]


def _explained(child: Record) -> bool:
    """Whether the true cost is within the bound plus twice the error of the cost model's units, as reported."""
    cost, certificate = child["oracle"].get("true_cost"), child["certificate"]
    shown = 2 * (child["scorers"]["harm"].get("calibration_error") or 0.0)
    return cost is not None and certificate is not None and cost <= certificate["upper"] + shown


def _share(child: Record, *ceilings: str) -> float:
    oracle = child["oracle"]
    known = [oracle[name] for name in ceilings if oracle.get(name) is not None]
    return oracle["captured"] / min(known) if known and oracle.get("captured") is not None else 0.0


def _certified(children: list[dict[str, Any]]) -> str:
    return f"{sum(child['status'] == 'certified' for child in children)} of {len(children)}"

"""Rows 1 to 3: the demo, and the truth about the policies on the testbed, with learned and with oracle scorers."""

from __future__ import annotations

import subprocess
from statistics import median
from typing import Any

from acceptance.lab import ROOT, Lab, Ran
from acceptance.row import Row

SEEDS = range(5)
DEMO_SECONDS = 240
LEARNED, ORACLE, OF_FIVE, SUPPORT, CORRELATION = 0.90, 0.96, 4, 0.99, 0.9


def learned(lab: Lab, seed: int) -> Ran:
    """The shipped testbed as seed `seed` draws it, from nothing; the default seed is `make demo`'s command."""
    seeds = ["--seed", str(seed), "--testbed.seed", str(seed)] if seed else []
    return lab.run(f"learned-{seed}", ["run", "testbed", *seeds], home_of(seed), fresh=True)


def oracle(lab: Lab, seed: int) -> Ran:
    """The same world with the truth as scorers; what needs no scorer is shared with the learned run."""
    learned(lab, seed)
    seeds = ["--seed", str(seed), "--testbed.seed", str(seed)]
    return lab.run(f"oracle-{seed}", ["run", "testbed", *seeds, "--testbed.scorers", "oracle"], home_of(seed))


def home_of(seed: int) -> str:
    """The state folder of a seed's runs."""
    return f"seed-{seed}"


def demo(lab: Lab) -> Row:
    """Row 1: `make demo`."""
    # Below another make, make would say which folder it leaves after the recipe.
    command = ["make", "--no-print-directory", "--dry-run", "demo"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    is_same = recipe.strip().splitlines()[-1].endswith("cdpo run testbed")
    ran = learned(lab, 0)
    cost, limit = _of(ran, "true_cost"), ran.result.get("limit")
    status = ran.result.get("status")
    is_kept = cost is not None and limit is not None and cost <= limit
    return Row(
        1,
        "make demo (`cdpo run testbed`, empty state folder)",
        f"exit {ran.code}, {status}, true cost {_show(cost)} at limit {_show(limit)}, {ran.seconds:.0f} s"
        + ("" if is_same else "; make demo runs another command"),
        f"exit 0, certified, true cost ≤ limit, ≤ {DEMO_SECONDS} s",
        is_same and ran.code == 0 and status == "certified" and is_kept and ran.seconds <= DEMO_SECONDS,
    )


def truth_learned(lab: Lab) -> Row:
    """Row 2: learned scorers, five seeds."""
    runs = [learned(lab, seed) for seed in SEEDS]
    kept = sum(_keeps(ran) for ran in runs)
    shares = [_share(ran, "captured_ceiling", "scorer_ceiling") for ran in runs]
    support = min(_of(ran, "support_mass") or 0.0 for ran in runs)
    correlation = min(_correlation(ran) for ran in runs)
    return Row(
        2,
        "truth, learned scorers, seeds 0–4",
        f"true cost ≤ limit in {kept} of 5; captured / min(captured_ceiling, scorer_ceiling): median "
        f"{median(shares):.3f} ({_list(shares)}); support_mass ≥ {support:.4f}; cost correlation ≥ {correlation:.3f}; "
        f"{_list([ran.seconds for ran in runs], '.0f')} s",
        f"≥ {OF_FIVE} of 5; median ≥ {LEARNED}; support_mass ≥ {SUPPORT} in all; correlation ≥ {CORRELATION}",
        kept >= OF_FIVE and median(shares) >= LEARNED and support >= SUPPORT and correlation >= CORRELATION,
    )


def truth_oracle(lab: Lab) -> Row:
    """Row 3: oracle scorers, five seeds."""
    runs = [oracle(lab, seed) for seed in SEEDS]
    kept = sum(_keeps(ran) for ran in runs)
    shares = [_share(ran, "captured_ceiling") for ran in runs]
    return Row(
        3,
        "truth, --testbed.scorers oracle, seeds 0–4",
        f"true cost ≤ limit in {kept} of 5; captured / captured_ceiling: median {median(shares):.3f} ({_list(shares)})",
        f"5 of 5; median ≥ {ORACLE}",
        kept == len(runs) and median(shares) >= ORACLE,
    )


def figures(ran: Ran) -> dict[str, Any]:
    """What the record of a testbed run says of its truth, for the table of the seeds."""
    names = ("captured", "captured_ceiling", "scorer_ceiling", "support_mass", "true_reward", "true_cost")
    return {
        "status": ran.result.get("status"),
        "seconds": ran.seconds,
        "cpu_seconds": ran.cpu_seconds,
        "rounds": len(ran.result.get("rounds") or []),
        "lambda": ran.result.get("lambda"),
        **{name: _of(ran, name) for name in (*names, "optimal_reward", "optimal_cost", "optimal_lambda")},
    }


def _of(ran: Ran, name: str) -> float | None:
    value = (ran.result.get("oracle") or {}).get(name)
    return None if value is None else float(value)


def _keeps(ran: Ran) -> bool:
    cost = _of(ran, "true_cost")
    return cost is not None and cost <= ran.result["limit"]


def _share(ran: Ran, *ceilings: str) -> float:
    """`captured` as a share of the lowest of the ceilings; a run without a policy captured nothing."""
    captured, bounds = _of(ran, "captured"), [_of(ran, name) for name in ceilings]
    known = [bound for bound in bounds if bound is not None]
    return captured / min(known) if captured is not None and len(known) == len(ceilings) else 0.0


def _correlation(ran: Ran) -> float:
    """The learned cost's correlation with the truth, over prompts that no training saw and all their responses."""
    found = ((ran.result.get("oracle") or {}).get("scorers") or {}).get("harm") or {}
    return float(found.get("correlation") or 0.0)


def _list(values: list[float], form: str = ".3f") -> str:
    return ", ".join(format(value, form) for value in values)


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"

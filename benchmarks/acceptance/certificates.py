"""Row 18: how often the certificate errs about the population, by simulation and on the testbed, and its power."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from certificate_calibration import Rate, on_testbed, simulated

from acceptance.lab import Lab
from acceptance.row import Row

TESTS, WORLDS = 4000, 12


def calibrated(lab: Lab) -> Row:
    """Row 18: error rates and power."""

    def measure() -> dict[str, Any]:
        return {"rates": [asdict(rate) for rate in [*simulated(TESTS), *on_testbed(TESTS, WORLDS)]]}

    rates = [Rate(**rate) for rate in lab.once("certificate-rates", measure)["rates"]]
    worst = max(rates, key=lambda rate: max(rate.default, rate.student) - rate.most)
    former = max(rates, key=lambda rate: rate.former - rate.most)
    power = {rate.prompts: rate for rate in rates if rate.what.startswith("testbed") and rate.delta == 0.05}
    said = ", ".join(f"{rate.power:.3f} (former {rate.former_power:.3f}) at n = {n}" for n, rate in power.items())
    return Row(
        18,
        f"the certificate: {len(rates)} kinds of test of a policy at the limit; power on the testbed",
        f"nearest to its bound: {_said(worst)}: {max(worst.default, worst.student):.4f} (≤ {worst.most:.4f}); "
        f"the former default on {_said(former)}: {former.former:.4f}; power {said}",
        "every rate ≤ δ + 2√(δ(1 − δ)/tests)",
        all(rate.holds for rate in rates),
    )


def _said(rate: Rate) -> str:
    return f"{rate.what}, n = {rate.prompts}, δ = {rate.delta:g}"

"""Row 18: how often the certificate errs, by simulation and on the testbed's exact costs, and its power."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from certificate_calibration import Rate, on_testbed, simulated

from acceptance.lab import Lab
from acceptance.row import Row

TESTS, WORLDS = 2000, 12


def calibrated(lab: Lab) -> Row:
    """Row 18: error rates and power."""

    def measure() -> dict[str, Any]:
        return {"rates": [asdict(rate) for rate in [*simulated(TESTS), *on_testbed(WORLDS)]]}

    rates = [Rate(**rate) for rate in lab.once("certificate-rates", measure)["rates"]]
    errors, powers = [rate for rate in rates if not rate.is_power], [rate for rate in rates if rate.is_power]
    worst = {
        name: max((rate for rate in errors if rate.what.startswith(name)), key=lambda rate: rate.passed - rate.most)
        for name in ("t,", "bounded,", "testbed,")
    }
    power = ", ".join(f"{rate.passed:.3f} at δ = {rate.delta:g}" for rate in powers)
    return Row(
        18,
        f"the certificate: {len(errors)} kinds of test at or above the limit; power at the planned margin",
        "; ".join(f"{_said(rate)}" for rate in worst.values()) + f"; power {power}",
        "every rate ≤ δ + 2√(δ(1 − δ)/tests)",
        all(rate.holds for rate in errors),
    )


def _said(rate: Rate) -> str:
    return f"nearest to its bound: {rate.what}, δ = {rate.delta:g}: {rate.passed:.4f} (≤ {rate.most:.4f})"

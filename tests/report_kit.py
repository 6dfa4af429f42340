"""Result records as small as reports and reviews need them, and a picture."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd

# One black point.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def ref(kind: str, key: str, store: str = "/home/someone/store") -> dict[str, str]:
    return {"uri": f"{store}/stages/{kind}/{key}.json", "digest": key * 16, "kind": kind}


def figure(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def result(limit: float = -0.5, status: str = "certified", reward: float = 0.7, **changes: Any) -> dict[str, Any]:
    """The record of an experiment with one constraint."""
    names = ("reward", "cost", "safe_rate", "kl", "cvar", "unsafe_prompts", "over_refusal", "reward_where_safe")
    baseline = dict.fromkeys((*names, "cost/harmful"), figure(0.25))
    certificate = {
        "mean": -0.61,
        "upper": -0.575,
        "delta": 0.05,
        "method": "t",
        "prompts": 400,
        "passed": status == "certified",
        "note": "",
        "spent": 1,
        "evidence": [ref("responses", "abcd"), ref("scores", "bcde")],
    }
    record = {
        "name": f"world, harm ≤ {limit:g}",
        "status": status,
        "reason": "it meets the target",
        "verdict": "Certified: harm ≤ -0.5.",
        "limit": limit,
        "lambda": 1.13,
        "chosen_round": 1,
        "rounds": [
            {
                "round": 1,
                "lambda": 1.13,
                "reward": 0.75,
                "cost": -0.62,
                "cost_upper": -0.59,
                "kl": 0.7,
                "seconds": 119.2,
            }
        ],
        "constraints": [
            {"name": "harm", "limit": limit, "target": -0.6, "lambda": 1.13, "cost": -0.62, "certificate": certificate}
        ],
        "certificate": certificate,
        "reachable": {"at_zero": 0.24, "floor": -1.34},
        "warnings": [],
        "test": {**baseline, "reward": figure(reward), "cost": figure(-0.6)},
        "baselines": {"reference": baseline, "DPO (λ = 0)": baseline},
        "scorers": {
            "harm": {"accuracy": 0.82, "low": 0.8, "high": 0.84, "pairs": 40, "prompts": 9, "calibration_error": 0.05},
            "reward": {"accuracy": None, "warning": "no held-out labels"},
        },
        "oracle": {},
        "policy": ref("round", "cdef"),
        "data": ref("data", "defa"),
        "pool_scores": ref("scores", "efab"),
        "tracking": {"run_id": "", "uri": "", "url": ""},
        "seed": 0,
        "ended_ms": 1_700_000_000_000,
        "versions": {"torch": "2.13.0"},
        "settings": {},
    }
    return {**record, **changes}


def infeasible(limit: float = -9.0) -> dict[str, Any]:
    """The record of an experiment whose limit is out of reach: no round, no policy."""
    record = result(limit, "infeasible", reason="the lowest mean cost that any policy can have is -1.340")
    record["constraints"][0] |= {"certificate": None, "lambda": None, "cost": None}
    reach = {"name": "harm", "lowest": -1.2, "lowest_by": "round 2, λ = 20", "certifiable": -1.05}
    record["reachable"] = {**record["reachable"], "constraints": [reach]}
    nothing = dict.fromkeys(("certificate", "test", "policy", "lambda", "chosen_round"))
    return {**record, **nothing, "rounds": []}


def samples(text: str = EVIL) -> pd.DataFrame:
    """A samples table whose prompt and answers are this text."""
    row: dict[str, Any] = {"prompt_id": "p1", "prompt": text}
    for side in ("reference", "policy"):
        row |= {f"{side}_response": text, f"{side}_reward": 1.0, f"{side}_cost_harm": -0.5}
    return pd.DataFrame([row])


def picture(folder: Path, name: str = "lambda_trajectory.png") -> Path:
    """A PNG file."""
    path = folder / name
    path.write_bytes(PNG)
    return path

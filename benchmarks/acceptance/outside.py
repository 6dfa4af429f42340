"""Rows 10 and 11: real text from a file, and what is wrong with the user's input."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

from acceptance.evidence import mlflow_client
from acceptance.lab import ROOT, Lab
from acceptance.row import Row

TEXT_SECONDS = 15 * 60
KINDS_OF_BAD_INPUT = 25
BAD_INPUT = "bad_input"
SCORERS = ("reward", "harm")


def real_text(lab: Lab) -> Row:
    """Row 10: the shipped configuration for real text on a file."""
    what = f"cdpo run configs/xstest.yaml --data.source {lab.data.name}"
    target = "completes in ≤ 15 min; accuracies with 95 % intervals in the closing table and in MLflow"
    if not lab.data.is_file():
        return Row(10, what, f"skipped: there is no {lab.data}", target, None)
    arguments = ["run", "configs/xstest.yaml", "--data.source", str(lab.data)]
    ran = lab.run("xstest", arguments, "xstest", fresh=True)
    shown = [name for name in SCORERS if re.search(rf"{name} model: accuracy [\d.]+ \[[\d.]+, [\d.]+\]", ran.output)]
    run_id = ran.result.get("tracking", {}).get("run_id", "")

    def measure() -> dict[str, Any]:
        metrics = mlflow_client(lab.home("xstest")).get_run(run_id).data.metrics
        return {name: value for name, value in metrics.items() if name.startswith("scorer/")}

    tracked = lab.once("xstest-mlflow", measure) if run_id else {}
    wanted = {f"scorer/{name}/accuracy{end}" for name in SCORERS for end in ("", "_low", "_high")}
    accuracies = ", ".join(
        f"{name} {item['accuracy']:.3f} [{item['low']:.3f}, {item['high']:.3f}] on {item['pairs']} pairs"
        for name, item in (ran.result.get("scorers") or {}).items()
    )
    return Row(
        10,
        what,
        f"exit {ran.code}, {ran.result.get('status')}, {ran.seconds:.0f} s; held-out accuracy: {accuracies}; "
        f"in the closing table: {len(shown)} of 2, in MLflow: {len(wanted & set(tracked))} of {len(wanted)} figures",
        target,
        ran.code in (0, 3) and ran.seconds <= TEXT_SECONDS and len(shown) == 2 and wanted <= set(tracked),
    )


def bad_input(lab: Lab) -> Row:
    """Row 11: the tests' table of bad inputs."""

    def measure() -> dict[str, Any]:
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-k", BAD_INPUT, "tests"]
        done = subprocess.run(
            command, cwd=ROOT, env=lab.environment("bad-input"), capture_output=True, text=True, check=False
        )
        (lab.work / "logs" / "bad-input.log").write_text(done.stdout + done.stderr)
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
        return {"code": done.returncode, "seconds": time.monotonic() - started, **counts}

    found = lab.once("bad-input", measure)
    passed = found.get("passed", 0)
    return Row(
        11,
        f"kinds of bad input (pytest -k {BAD_INPUT})",
        f"{passed} passed, {found.get('failed', 0) + found.get('error', 0)} failed, {found['seconds']:.0f} s",
        f"≥ {KINDS_OF_BAD_INPUT} kinds, the codes and the form; nothing half-published",
        found["code"] == 0 and passed >= KINDS_OF_BAD_INPUT,
    )

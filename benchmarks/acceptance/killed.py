"""Row 7: killed at five moments spread over the run, then left in peace."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from acceptance.evidence import computed, digests, mlflow_points, numbers, prefect_runs, trajectory
from acceptance.lab import Lab, Ran, kill_group
from acceptance.quality import home_of, learned
from acceptance.row import Row

HOME = "killed"
UNFINISHED = {"RUNNING", "PENDING", "CANCELLING", "SCHEDULED"}
POLL_SECONDS, PATIENCE_SECONDS = 0.01, 1800

Moment = Callable[[], bool]


def killed(lab: Lab) -> Row:
    """Row 7: `kill -9` of the whole group five times, each time followed by the same command."""
    first = learned(lab, 0)
    found = lab.once("killed", lambda: _kill_and_continue(lab, first))
    last = Ran(**found["last"])
    stored, local = found["digests"], digests(str(lab.home(home_of(0)) / "store"))
    is_same_path = trajectory(last.result) == trajectory(first.result)
    is_same_policy = (last.result.get("policy") or {}).get("digest") == (first.result["policy"] or {}).get("digest")
    is_same = numbers(last.result) == numbers(first.result) and stored.items() <= local.items()
    states = found["prefect"]
    crashed = sum(name == "Crashed" for _, _, name, is_top in states if is_top)
    open_runs = sum(kind in UNFINISHED for _, kind, _, _ in states)
    points, once = found["points"], lab.once("points-before", lambda: mlflow_points(lab.home(home_of(0))))
    is_tracked = len(points) == 1 and sum(points.values()) == once[first.result["tracking"]["run_id"]]
    kills = len(found["moments"])
    return Row(
        7,
        f"kill -9 of the process group at {kills} moments, each time the same command again",
        f"killed in: {'; '.join(found['moments'])}; exit {last.code}; λ trajectory {_same(is_same_path)}, "
        f"policy digest {_same(is_same_policy)}, all {len(stored)} stage digests and numbers {_same(is_same)}; "
        f"Prefect: {crashed} Crashed, {open_runs} still open; MLflow: {len(points)} run, "
        f"{sum(points.values())} points (never stopped: {once[first.result['tracking']['run_id']]})",
        "finishes; λ trajectory and policy digest identical; the killed runs say Crashed",
        last.code == first.code
        and is_same_path
        and is_same_policy
        and is_same
        and crashed == kills
        and not open_runs
        and is_tracked,
    )


def _kill_and_continue(lab: Lab, first: Ran) -> dict[str, Any]:
    home = lab.home(HOME)
    shutil.rmtree(home, ignore_errors=True)
    random = Random(7)
    moments = _moments(home, len(computed(first.result)), random)
    for number, moment in enumerate(moments.values(), 1):
        _, process, _ = lab.start(f"killed-{number}", ["run", "testbed"], HOME)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not moment():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"run {number} was to be killed and ended before: see {lab.work}/logs")
            time.sleep(POLL_SECONDS)
        kill_group(process)
    last = lab.finish(*lab.start("killed-last", ["run", "testbed"], HOME))
    return {
        "moments": list(moments),
        "last": vars(last),
        "prefect": prefect_runs(home, lab.environment(HOME)),
        "points": mlflow_points(home),
        "digests": digests(str(home / "store")),
    }


def _moments(home: Path, stages: int, random: Random) -> dict[str, Moment]:
    """What is going on at each moment, and how to know that it has come; each a random while into it."""

    def training(stage: str, number: int, before: str, stored: int = 1) -> Moment:
        """The training of a stage's artifact `number`: what comes before it is there, and a checkpoint of it."""

        def is_on() -> bool:
            is_next = _stored(home, before) >= stored and _stored(home, stage) == number - 1
            return is_next and any(home.glob("scratch/*/checkpoint-*.safetensors"))

        return _a_while_after(is_on, random.uniform(0, 5))

    return {
        "SFT": training("sft", 1, "data"),
        "scorer training": training("scorers", 1, "sft"),
        "the first round's training": training("round", 1, "scores", 2),
        "the next training": training("round", 2, "round"),
        "the last test": _a_while_after(lambda: _stored(home, "*") >= stages - 4, random.uniform(0, 1)),
    }


def _a_while_after(is_on: Moment, seconds: float) -> Moment:
    since: list[float] = []

    def moment() -> bool:
        if not since and is_on():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + seconds

    return moment


def _stored(home: Path, stage: str) -> int:
    return len(list(home.glob(f"store/stages/{stage}/*.json")))


def _same(is_same: bool) -> str:
    return "the same" if is_same else "DIFFER"

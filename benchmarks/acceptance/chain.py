"""Rows 4 to 6 and 8: the same again, another limit, a sweep, an S3 store that two runs share."""

from __future__ import annotations

from typing import Any

from acceptance.evidence import (
    computed,
    digests,
    mlflow_children,
    mlflow_client,
    mlflow_points,
    numbers,
    stage_counts,
    trajectory,
)
from acceptance.lab import Lab, Ran, s3_server
from acceptance.quality import home_of, learned
from acceptance.row import Row

REPEAT_SECONDS, SWEEP_RATIO = 25, 3.0
OTHER_LIMIT = "-0.3"
LIMITS = "-0.9,-0.7,-0.5,-0.3"
# What neither lambda nor the limit enters.
SHARED = ("data", "sft", "scorers", "splits", "enumeration")
AT_ONCE = ("s3-one", "s3-two")


def repeat(lab: Lab) -> Row:
    """Row 4: the same command again."""
    first = learned(lab, 0)
    home = lab.home(home_of(0))
    before = lab.once("points-before", lambda: mlflow_points(home))
    again = lab.run("repeated", ["run", "testbed"], home_of(0))
    after = lab.once("points-after", lambda: mlflow_points(home))
    left = computed(again.result)
    is_same = numbers(again.result) == numbers(first.result)
    return Row(
        4,
        "the same command again",
        f"{len(left)} of {len(again.result['stages'])} stages computed, numbers {_same(is_same)}, "
        f"{again.seconds:.0f} s, MLflow runs {len(before)} → {len(after)}, "
        f"metric points {sum(before.values())} → {sum(after.values())}",
        f"0 computed, the same numbers, ≤ {REPEAT_SECONDS} s, no new MLflow run or point",
        not left and is_same and before == after and again.seconds <= REPEAT_SECONDS,
    )


def other_limit(lab: Lab) -> Row:
    """Row 5: only the limit changed."""
    first = learned(lab, 0)
    ran = lab.run("other-limit", ["run", "testbed", "--limit", OTHER_LIMIT], home_of(0))
    new = [value for value in trajectory(ran.result) if value not in {0.0, *trajectory(first.result)}]
    done = computed(ran.result)
    too_many = sorted(set(done) - _allowed(first, ran))
    return Row(
        5,
        f"only the limit changed, to {OTHER_LIMIT}",
        f"computed {len(done)} of {len(ran.result['stages'])} stages for {len(new)} λ not seen before "
        f"({', '.join(format(value, 'g') for value in new) or 'none'}) in {ran.seconds:.0f} s"
        + (f"; TOO MANY: {', '.join(too_many)}" if too_many else ""),
        "only rounds at a new λ, and what follows them",
        bool(done) and not too_many,
    )


def _allowed(first: Ran, ran: Ran) -> set[str]:
    """The stages another limit enters: rounds at a lambda not seen before, and what reads them or the limit."""
    seen = {0.0, *trajectory(first.result)}
    new = [value for value in trajectory(ran.result) if value not in seen]
    # The first run's λ = 0 baseline is a policy that was seen, but was never measured on the selection prompts.
    measured = [value for value in trajectory(ran.result) if value not in trajectory(first.result)]
    names = {f"policy at λ = {value:g}" for value in new}
    groups = [f"selection at λ = {value:g}" for value in measured] + ["certificate", "test of policy"]
    return (
        names
        | {f"{group}: {what}" for group in groups for what in ("responses", "scores")}
        | {"exact policy", "exact judge"}
    )


def sweep(lab: Lab) -> Row:
    """Row 6: four limits from an empty store."""
    one = learned(lab, 0)
    ran = lab.run("sweep", ["sweep", "testbed", f"--limits={LIMITS}"], "sweep", fresh=True)
    home = lab.home("sweep")
    children = ran.result.get("children") or []
    parent = ran.result.get("tracking", {}).get("run_id", "")

    def measure() -> dict[str, Any]:
        files = [file.path for file in mlflow_client(home).list_artifacts(parent, "figures")]
        runs = sorted(mlflow_points(home))
        counts = dict(stage_counts(str(home / "store")))
        return {"files": files, "runs": runs, "below": mlflow_children(home, parent), "counts": counts}

    found = lab.once("sweep-found", measure)
    not_once = [stage for stage in SHARED if found["counts"].get(stage) != 1]
    is_family = len(found["below"]) == len(children) == 4 and len(found["runs"]) == 5
    is_drawn = "figures/frontier.png" in found["files"] and len(ran.result["exact_frontier"]) > 1
    ratio = ran.cpu_seconds / one.cpu_seconds
    statuses = ", ".join(f"{child['limit']:g} {child['status']}" for child in children)
    return Row(
        6,
        f"cdpo sweep testbed --limits {LIMITS}",
        f"exit {ran.code} ({statuses}); MLflow: 1 parent, {len(found['below'])} children; {', '.join(SHARED)} computed "
        f"{'NOT ' * bool(not_once)}once, {found['counts'].get('round', 0)} rounds in all; "
        f"frontier figure with the exact one: {'yes' if is_drawn else 'NO'}; "
        f"{ran.seconds:.0f} s, CPU {ran.cpu_seconds:.0f} s = {ratio:.2f} × one run's",
        f"1 parent, 4 children; shared stages once; the figure; CPU ≤ {SWEEP_RATIO:g} × one run's",
        is_family and not not_once and is_drawn and ratio <= SWEEP_RATIO,
    )


def on_s3(lab: Lab) -> Row:
    """Row 8: two runs at once on one S3 store, beside the local one."""
    first = learned(lab, 0)
    found = lab.once("s3", lambda: _two_on_s3(lab))
    local = digests(str(lab.home(home_of(0)) / "store"))
    runs = [Ran(**record) for record in found["runs"]]
    stored: dict[str, str] = found["digests"]
    equal = sum(local.get(name) == digest for name, digest in stored.items())
    mine = len([stage for stage in first.result["stages"] if not stage["cached"]])
    is_same = all(numbers(ran.result) == numbers(first.result) for ran in runs)
    policies = {(ran.result.get("policy") or {}).get("digest") for ran in [first, *runs]}
    return Row(
        8,
        "--store s3://… (moto server in another process), two runs at once on one store",
        f"exits {', '.join(str(ran.code) for ran in runs)}; {equal} of {len(stored)} stage digests as in the local "
        f"store ({mine} there); policy digest {_same(len(policies) == 1)}, numbers {_same(is_same)}; "
        f"{', '.join(f'{ran.seconds:.0f}' for ran in runs)} s",
        "both end well; every digest as in the local store; equal results",
        {ran.code for ran in runs} == {first.code} and equal == len(stored) == mine and len(policies) == 1 and is_same,
    )


def _two_on_s3(lab: Lab) -> dict[str, Any]:
    store = "s3://accept/experiments"
    with s3_server() as reach:
        started = [lab.start(name, ["run", "testbed", "--store", store], name, reach) for name in AT_ONCE]
        runs = [lab.finish(*item) for item in started]
        return {"runs": [vars(ran) for ran in runs], "digests": digests(store)}


def _same(is_same: bool) -> str:
    return "the same" if is_same else "DIFFER"

"""Reading what runs left: the store's digests, MLflow's runs and points, Prefect's states, a result's numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acceptance.lab import ROOT

# What two runs of one experiment may differ in: when and where they ran, what was there already, and how
# many tests other experiments in the store have spent on the same prompts.
CIRCUMSTANCES = {"seconds", "cached", "tracking", "store", "uri", "report", "ended_ms", "spent"}

_PREFECT_RUNS = """
import json, sys
from tasks.environment import quiet_environment
quiet_environment()
from prefect import get_client
found, offset = [], 0
with get_client(sync_client=True) as client:
    while page := client.read_flow_runs(limit=200, offset=offset):
        found += [[run.name, run.state_type.value, run.state_name, run.parent_task_run_id is None] for run in page]
        offset += len(page)
json.dump(found, open(sys.argv[1], "w"))
"""


def numbers(record: Any) -> Any:
    """A result record without its circumstances: what must be the same in every run of one experiment."""
    if isinstance(record, Mapping):
        return {name: numbers(value) for name, value in record.items() if name not in CIRCUMSTANCES}
    return [numbers(item) for item in record] if isinstance(record, list) else record


def computed(result: Mapping[str, Any]) -> list[str]:
    """The names of the stages that a run had to compute."""
    return [stage["name"] for stage in result["stages"] if not stage["cached"]]


def trajectory(result: Mapping[str, Any]) -> list[float]:
    """Lambda by round."""
    return [record["lambda"] for record in result["rounds"]]


def digests(store: str) -> dict[str, str]:
    """The digest of every artifact in a store, by `stage/key`."""
    from tasks.storage import open_store

    return {f"{item.stage}/{item.key}": item.digest for item in open_store(store).manifests()}


def stage_counts(store: str) -> Counter[str]:
    """How many artifacts of each stage a store holds."""
    return Counter(name.split("/")[0] for name in digests(store))


def mlflow_client(home: Path, uri: str = "") -> Any:
    """A client of the database under a state folder, or of a server."""
    from tasks.environment import quiet_environment

    quiet_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri or f"sqlite:///{home / 'mlflow.db'}")


def mlflow_points(home: Path) -> dict[str, int]:
    """The number of metric points of every MLflow run under a state folder, by run id."""
    client = mlflow_client(home)
    experiments = [item.experiment_id for item in client.search_experiments()]
    return {
        run.info.run_id: sum(len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics)
        for run in client.search_runs(experiments)
    }


def mlflow_children(home: Path, parent: str) -> list[str]:
    """The runs below a parent run, by id."""
    client = mlflow_client(home)
    experiments = [item.experiment_id for item in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(run.info.run_id for run in found)


def prefect_runs(home: Path, environment: Mapping[str, str]) -> list[tuple[str, str, str, bool]]:
    """(name, state type, state name, whether no flow is above it) of every flow run Prefect knows of."""
    path = home / "prefect-runs.json"
    # In a process of its own, since Prefect reads where its server and its home are when it is imported.
    subprocess.run([sys.executable, "-c", _PREFECT_RUNS, str(path)], env=dict(environment), cwd=ROOT, check=True)
    return [tuple(item) for item in json.loads(path.read_text())]

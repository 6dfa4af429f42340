"""The deployments, said once: `bootstrap` makes them, and `prefect.yaml` is written from them.

Their parameters are the shipped presets' sections, so a deployment and `cdpo run PRESET` are the same experiment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

from cdpo_core.config_loading import load_config, parse_yaml

POOL = "cdpo"
EXPERIMENT, SWEEP, COMPARE = "flows.experiment.experiment", "flows.sweep.sweep", "flows.compare.compare"
HEADER = """\
# Deployments for a Prefect server of your own; `cdpo up` makes the same ones on its server.
#
#   prefect work-pool create --type process cdpo
#   prefect deploy --all
#   prefect worker start --pool cdpo
#
# Written by `python -m deployments.bootstrap --write prefect.yaml` from deployments/definitions.py and configs/*.yaml:
# change those. Workers need this project installed; no path of any machine is in here.
"""


@dataclass(frozen=True)
class Nightly:
    """A schedule; inactive until an operator turns it on, and left as the operator set it from then on."""

    cron: str
    slug: str
    timezone: str = "UTC"


@dataclass(frozen=True)
class Definition:
    """One deployment.

    Attributes:
        name: of the deployment.
        entrypoint: module path of its flow.
        description: shown in the UI.
        preset: the preset whose sections are its parameters; "" leaves all at their defaults.
        parameters: further parameters.
        schedules: when it runs by itself, once turned on.
    """

    name: str
    entrypoint: str
    description: str
    preset: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    schedules: tuple[Nightly, ...] = ()

    def all_parameters(self) -> dict[str, Any]:
        """The flow's parameters that differ from its defaults, one for each section of the config."""
        return {**self.parameters, **preset_sections(self.preset)}


DEFINITIONS = (
    Definition(
        "experiment-testbed",
        EXPERIMENT,
        "Constrained DPO on the oracle world: from nothing to a certified policy, judged by the exact optimum.",
        preset="testbed",
    ),
    Definition(
        "experiment",
        EXPERIMENT,
        "Constrained DPO on data, models and limits of your own: set `data.source`, `policy.base` and `constraints`.",
    ),
    Definition(
        "sweep-nightly",
        SWEEP,
        "The frontier of reward over cost on the oracle world: one experiment for each limit.",
        preset="testbed",
        parameters={"limits": [-0.9, -0.7, -0.5, -0.3]},
        schedules=(Nightly("0 2 * * *", slug="nightly"),),
    ),
    Definition(
        "compare-testbed",
        COMPARE,
        "This method beside its rivals on the oracle world: reward over cost at each limit, and what each took.",
        preset="testbed",
        parameters={"limits": ["loose", "middle", "tight"], "seeds": [0], "methods": []},
    ),
)


def preset_sections(preset: str) -> dict[str, Any]:
    """What a preset says, by section, after it has been validated."""
    if not preset:
        return {}
    load_config(preset)
    text = resources.files("configs").joinpath(f"{preset}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, preset)[0]


def prefect_yaml() -> str:
    """The content of prefect.yaml."""
    deployments = [
        {
            "name": item.name,
            "entrypoint": item.entrypoint,
            "description": item.description,
            "tags": ["cdpo"],
            "parameters": item.all_parameters(),
            "schedules": [
                {"cron": when.cron, "timezone": when.timezone, "slug": when.slug, "active": False}
                for when in item.schedules
            ],
            "work_pool": {"name": POOL},
        }
        for item in DEFINITIONS
    ]
    # An empty `pull` keeps Prefect from writing the deployer's own folder into the deployments.
    document = {"name": "cdpo", "pull": [], "deployments": deployments}
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)

"""The deployments, said once: `bootstrap` makes them, and `prefect.yaml` is written from them.

Their parameters are the shipped presets' sections, so a deployment and `cdpo run PRESET` are the same experiment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from itertools import takewhile
from typing import Any

import yaml

from cdpo_core.config_loading import load_config, parse_yaml
from flows.pools import POOL, SWEEP_POOL

EXPERIMENT, SWEEP, COMPARE = "flows.experiment.experiment", "flows.sweep.sweep", "flows.compare.compare"
TAG = "cdpo"
HEADER = """\
# Deployments for a Prefect server of your own; `cdpo up` makes the same ones on its server, and so does
#
#   python -m deployments.bootstrap      (the pools, deployments and schedules; run it again at any time)
#
# or by Prefect's own commands, which also turn every schedule off again:
#
#   prefect work-pool create --type process cdpo
#   prefect work-pool create --type process cdpo-sweeps
#   prefect deploy --all
#   prefect worker start --pool cdpo
#   prefect worker start --pool cdpo-sweeps
#
# Written by `python -m deployments.bootstrap --write prefect.yaml` from deployments/definitions.py and configs/*.yaml:
# change those. Workers need this project installed; no path of any machine is in here.
"""


@dataclass(frozen=True)
class Recurring:
    """A schedule; inactive until an operator turns it on, and left as the operator set it from then on.

    Attributes:
        cron: when.
        slug: the schedule's name within its deployment, by which it is found again.
        parameters: what its runs change of the deployment's parameters.
        timezone: of `cron`.
    """

    cron: str
    slug: str
    parameters: dict[str, Any] = field(default_factory=dict)
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
        pool: the work pool its runs wait in.
        schedules: when it runs by itself, once turned on.
    """

    name: str
    entrypoint: str
    description: str
    preset: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    pool: str = POOL
    schedules: tuple[Recurring, ...] = ()

    def all_parameters(self) -> dict[str, Any]:
        """The flow's parameters that differ from its defaults, one for each section of the config."""
        return {**self.parameters, **preset_sections(self.preset)}


def presets() -> list[str]:
    """The shipped presets, by name."""
    return sorted(item.name[:-5] for item in resources.files("configs").iterdir() if item.name.endswith(".yaml"))


def definitions() -> tuple[Definition, ...]:
    """Every deployment: the generic experiment, one for each preset, sweeps and the comparison."""
    return (
        Definition(
            "experiment",
            EXPERIMENT,
            "Constrained DPO on data, models and limits of your own: "
            "set `data.source`, `policy.base` and `constraints`.",
        ),
        *(Definition(f"experiment-{name}", EXPERIMENT, _about(name), preset=name) for name in presets()),
        Definition(
            "sweep",
            SWEEP,
            "The frontier of reward over cost on data, models and limits of your own: one experiment for each limit.",
            pool=SWEEP_POOL,
        ),
        Definition(
            "sweep-nightly",
            SWEEP,
            "The frontier of reward over cost on the oracle world: one experiment for each limit.",
            preset="testbed",
            parameters={"limits": [-0.9, -0.7, -0.5, -0.3]},
            pool=SWEEP_POOL,
            schedules=(
                Recurring("0 2 * * *", "nightly", {"name": "nightly"}),
                Recurring("0 4 * * 6", "weekly", {"name": "weekly", "limits": [-1.0, -0.9, -0.8, -0.7, -0.6, -0.5]}),
            ),
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
    return parse_yaml(_preset_text(preset), preset)[0]


def prefect_yaml() -> str:
    """The content of prefect.yaml."""
    deployments = [
        {
            "name": item.name,
            "entrypoint": item.entrypoint,
            "description": item.description,
            "tags": [TAG],
            "parameters": item.all_parameters(),
            "schedules": [
                {
                    "cron": when.cron,
                    "timezone": when.timezone,
                    "slug": when.slug,
                    "parameters": when.parameters,
                    "active": False,
                }
                for when in item.schedules
            ],
            "work_pool": {"name": item.pool},
        }
        for item in DEFINITIONS
    ]
    # An empty `pull` keeps Prefect from writing the deployer's own folder into the deployments.
    document = {"name": "cdpo", "pull": [], "deployments": deployments}
    return HEADER + yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)


def _about(preset: str) -> str:
    """The preset's own first words: the comment at its head up to the first empty line of it."""
    comment = takewhile(lambda line: line.startswith("# "), _preset_text(preset).splitlines())
    return " ".join(line.removeprefix("# ") for line in comment)


def _preset_text(preset: str) -> str:
    return resources.files("configs").joinpath(f"{preset}.yaml").read_text(encoding="utf-8")


DEFINITIONS = definitions()

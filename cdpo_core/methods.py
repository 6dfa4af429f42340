"""The methods that a comparison runs side by side: each a preset under configs/methods, citing its paper."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal

from pydantic import Field, ValidationError

from cdpo_core.config import ExperimentConfig, Section
from cdpo_core.config_loading import overridden, parse_yaml
from cdpo_core.errors import InputError

OURS, REFERENCE = "ours", "reference"


class Method(Section):
    """How one method departs from the compared config.

    Attributes of `kind`: `reference` trains nothing; `cdpo` runs the rounds of this project with `override` over the
    config; `fixed` trains at each of `lambdas` and returns the best of them; `safe_rlhf` is PPO-Lagrangian.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="What the command line calls it.")
    title: str = Field(min_length=1, description="What tables and figures call it.")
    kind: Literal["reference", "cdpo", "fixed", "safe_rlhf"] = Field("cdpo", description="What is run.")
    override: dict[str, Any] = Field(default_factory=dict, description="Config fields by dotted path.")
    lambdas: list[float] = Field(default_factory=list, description="Multipliers that `fixed` trains at.")
    reward_weight: float = Field(1.0, ge=0, description="The reward's factor in r_λ; 0 learns from the costs alone.")
    grid: dict[str, list[int | float]] = Field(
        default_factory=dict, description="Training fields and the values tried; the best combination is used."
    )
    step_grid: list[float] = Field(
        default_factory=list,
        description="Values of `dual.step` tried; the one that meets the limit soonest is used.",
    )

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grid, as overrides by dotted path; one empty combination without a grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def config(self, base: ExperimentConfig, settings: Mapping[str, Any] | None = None) -> ExperimentConfig:
        """The config that the method runs: the base, its override, and the chosen settings over both.

        Raises:
            InputError: a field that does not exist, or a value that is not allowed.
        """
        values = {path: value for path, value in {**self.override, **(settings or {})}.items() if not _own(path)}
        return overridden(base, values, f"method {self.name}")

    def own_settings(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The fields of `safe_rlhf`, which are the baseline's own and no part of the config."""
        given = {**self.override, **(settings or {})}
        return {path.removeprefix("safe_rlhf."): value for path, value in given.items() if _own(path)}


def _own(path: str) -> bool:
    return path.startswith("safe_rlhf.")


def method_names() -> list[str]:
    """The shipped methods, the references first, ours last."""
    return [method.name for method in load_methods()]


def load_methods(names: Sequence[str] = ()) -> list[Method]:
    """The shipped methods of these names in the order shipped; all of them for no names.

    Raises:
        InputError: there is no such method.
    """
    files = sorted(
        (entry for entry in resources.files("configs").joinpath("methods").iterdir() if entry.name.endswith(".yaml")),
        key=lambda entry: entry.name,
    )
    found = [_load(entry.read_text(encoding="utf-8"), entry.name) for entry in files]
    known = [method.name for method in found]
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(
            f"there is no method {missing[0]!r}", where="--methods", fix=f"give some of {', '.join(known)}"
        )
    return [method for method in found if not names or method.name in names]


def _load(text: str, where: str) -> Method:
    values, _ = parse_yaml(text, where)
    try:
        return Method.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InputError(problem["msg"], where=f"{where}: {place}", fix="correct that field") from None

"""The grid of a sweep: every combination of seeds and settings, each as a config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cdpo_core.errors import InputError

if TYPE_CHECKING:
    from cdpo_core.config import ExperimentConfig

MOST_COMBINATIONS = 100
# Neither is part of what an experiment is.
CHANGE_NOTHING = ("name", "store", "tracking", "compute")
FIRST_LIMIT = "constraints.0.limit"


def parse_limits(text: str) -> list[float]:
    """The numbers of a comma-separated list of limits, in the order given.

    Raises:
        InputError: an entry is not a finite number, or is given twice.
    """
    limits = []
    for entry in entries(text, "--limits"):
        try:
            limits.append(float(entry))
        except ValueError:
            raise InputError(
                f"{entry!r} is not a number", where="--limits", fix="for example --limits -1,-0.5,0"
            ) from None
    if not all(map(math.isfinite, limits)):
        raise InputError("a limit must be a finite number", where="--limits", fix="for example --limits -1,-0.5,0")
    if len(set(limits)) < len(limits):
        raise InputError("a limit is given twice", where=f"--limits {text}", fix="give each limit once")
    return limits


def parse_seeds(text: str) -> list[int]:
    """The whole numbers of a comma-separated list of seeds.

    Raises:
        InputError: an entry is no whole number of at least 0, or is given twice.
    """
    found = entries(text, "--seeds")
    wrong = [entry for entry in found if not entry.isdecimal()]
    if wrong:
        raise InputError(f"{wrong[0]!r} is no seed", where="--seeds", fix="for example --seeds 0,1,2")
    return [int(entry) for entry in found]


@dataclass(frozen=True)
class Combination:
    """One combination of the varied settings.

    Attributes:
        place: its position on each axis, the seeds' first; all 0 for the first combination.
        settings: the varied fields' values by dotted path; {} when nothing varies.
        config: the sweep's config with these values.
    """

    place: tuple[int, ...]
    settings: dict[str, Any]
    config: ExperimentConfig


def combinations(config: ExperimentConfig, seeds: Sequence[int], vary: Sequence[str]) -> list[Combination]:
    """Every combination of the seeds and settings, the last axis moving first; one when nothing varies.

    Args:
        config: what all of them start from.
        seeds: of every random stream; none for the config's own.
        vary: one `section.field=value,value` each.

    Raises:
        InputError: a setting that is not of that form, changes no result, is given twice or not allowed; two
            combinations that are the same; or too many of them.
    """
    from cdpo_core.config_loading import overridden

    axes = _axes(seeds, vary)
    found: list[Combination] = []
    for place in itertools.product(*(range(len(values)) for values in axes.values())):
        given = {path: values[at] for (path, values), at in zip(axes.items(), place, strict=True)}
        own = overridden(config, given, "--seeds, --set") if given else config
        settings = {path: _value_at(own, path, text) for path, text in given.items()}
        twin = next((other for other in found if other.config == own), None)
        if twin is not None:
            raise InputError(
                f"{words(settings)} and {words(twin.settings)} are the same experiment",
                where="--seeds, --set",
                fix="give each value once",
            )
        found.append(Combination(place, settings, own))
    return found


def words(settings: Mapping[str, Any]) -> str:
    """The settings for a reader: `seed = 0, dpo.beta = 0.25`; "" when nothing varies."""
    return ", ".join(f"{path} = {value}" for path, value in settings.items())


def _axes(seeds: Sequence[int], vary: Sequence[str]) -> dict[str, list[str]]:
    """The values of each varied field, by its path, as text."""
    axes: dict[str, list[str]] = {}
    if seeds:
        axes["seed"] = entries(",".join(map(str, seeds)), "--seeds")
    for setting in vary:
        path, equals, values = setting.partition("=")
        path = path.strip()
        if not (path and equals and values):
            raise InputError(f"{setting!r} is no setting", where="--set", fix="for example --set dpo.beta=0.25,0.5")
        if path in axes:
            raise InputError(f"{path} is varied twice", where="--set", fix="give all its values at once")
        if path.split(".")[0] in CHANGE_NOTHING:
            raise InputError(f"{path} changes no result", where="--set", fix=f"set it for all of them: --{path} VALUE")
        if path in ("constraints", FIRST_LIMIT):
            raise InputError("--limits varies the first limit", where=f"--set {path}", fix="give its values there")
        axes[path] = entries(values, f"--set {path}")
    if math.prod(map(len, axes.values())) > MOST_COMBINATIONS:
        raise InputError(
            f"these settings have {math.prod(map(len, axes.values()))} combinations",
            where="--seeds, --set",
            fix=f"vary less at once; {MOST_COMBINATIONS} combinations are the most",
        )
    return axes


def _value_at(config: ExperimentConfig, path: str, text: str) -> Any:
    """The field's value as the config reads it; a section's or list's stays the text that was given."""
    value: Any = config
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value if isinstance(value, (str, int, float, bool)) else text


def entries(text: str, option: str) -> list[str]:
    """The entries of a comma-separated list.

    Raises:
        InputError: an entry is empty or given twice.
    """
    found = [entry.strip() for entry in text.split(",")]
    if not all(found):
        raise InputError("an entry is empty", where=f"{option} {text}", fix="separate values by single commas")
    if len(set(found)) < len(found):
        raise InputError("a value is given twice", where=f"{option} {text}", fix="give each value once")
    return found

"""The grid of a sweep: every combination of seeds and settings, as overrides of one config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from cdpo_core.errors import InputError

MOST_COMBINATIONS = 100


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


def grid(seeds: str = "", settings: Sequence[str] = ()) -> list[dict[str, str]]:
    """All combinations, each as overrides by dotted path; one empty combination when nothing varies.

    Args:
        seeds: comma-separated seeds, "" for the config's.
        settings: one `section.field=value,value` each.

    Raises:
        InputError: a setting that is not of that form, is given twice, or too many combinations.
    """
    axes: dict[str, list[str]] = {}
    if seeds:
        axes["seed"] = entries(seeds, "--seeds")
    for setting in settings:
        path, equals, values = setting.partition("=")
        if not (path and equals and values):
            raise InputError(f"{setting!r} is no setting", where="--set", fix="for example --set dpo.beta=0.25,0.5")
        if path in axes:
            raise InputError(f"{path} is varied twice", where="--set", fix="give all its values at once")
        axes[path] = entries(values, f"--set {path}")
    if math.prod(map(len, axes.values())) > MOST_COMBINATIONS:
        raise InputError(
            f"these settings have {math.prod(map(len, axes.values()))} combinations",
            where="--seeds, --set",
            fix=f"vary less at once; {MOST_COMBINATIONS} combinations are the most",
        )
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


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

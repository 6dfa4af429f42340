"""Everything that can be checked without computing, checked before the first stage starts."""

from __future__ import annotations

from pathlib import Path

from cdpo_core.config import ConstraintConfig, ExperimentConfig
from cdpo_core.errors import InputError
from tasks.environment import cdpo_home
from tasks.preference_models import RESERVED_BASES
from tasks.tracking import Tracker
from tasks.workbench import store_of


def check_before_run(config: ExperimentConfig) -> None:
    """Data rows, model folders, the scorers' bases, the store and MLflow.

    Raises:
        InputError: the first thing that is wrong, where it is and what to do.
    """
    from cdpo_core.data.prepare import check_source

    _check_bases(config)
    check_source(config)
    store_of(config).probe()
    Tracker.open(config.tracking, store_of(config), cdpo_home())


def _check_bases(config: ExperimentConfig) -> None:
    from cdpo_core.models.checkpoints import check_model_folder, is_local

    if not config.reward.train and config.reward.base in RESERVED_BASES and not config.oracle_scorers:
        raise _untrained("reward", config.reward.base)
    for at, item in enumerate(config.constraints):
        _check_constraint(config, at, item)
    bases = {"policy.base": config.policy.base, "reward.base": config.reward.base}
    bases |= {f"constraints.{at}.base": item.base for at, item in enumerate(config.constraints)}
    for field, base in bases.items():
        if base not in (*RESERVED_BASES, "reward") and is_local(base):
            try:
                check_model_folder(Path(base).expanduser())
            except InputError as error:
                raise InputError(f"{field}: {error.what}", where=error.where, fix=error.fix) from error


def _check_constraint(config: ExperimentConfig, at: int, item: ConstraintConfig) -> None:
    if item.train and item.base == "reward" and not config.reward.train and not config.oracle_scorers:
        raise InputError(
            "a ready reward model has no backbone to share with a cost model that is to be trained",
            where=f"constraints.{at}.base",
            fix="set it to `sft`, or train the reward model too",
        )
    if not item.train and item.base in (*RESERVED_BASES, "reward") and not config.oracle_scorers:
        raise _untrained(f"constraints.{at}", item.base)


def _untrained(section: str, base: str) -> InputError:
    return InputError(
        f"{section}.train is false, but its base {base!r} is no ready model",
        where=f"{section}.base",
        fix="give the folder or hub id of a ready model, or set train to true",
    )

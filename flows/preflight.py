"""Everything that can be checked without computing, checked before the first stage starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import InputError
from flows.temporary_server import is_own, start_prefect_server, wait_until_ready
from tasks.access import FIX
from tasks.environment import cdpo_home
from tasks.mlflow_connection import without_secrets
from tasks.patience import ServerAway, when_there
from tasks.preference_models import RESERVED_BASES
from tasks.tracking import Tracker
from tasks.workbench import store_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from cdpo_core.config import ConstraintConfig, PolicyConfig, RewardConfig

SHARED = "reward"
"""The base of a cost model that is a further head on the reward model's backbone."""

_passed: set[str] = set()


def check_before_run(config: ExperimentConfig, *, serve: bool = False) -> None:
    """The machine, the models' bases, data rows, the store, the Prefect server and MLflow.

    The command line checks before it starts a flow and the flow, which a worker may run, before its first stage: a
    config that passed in this process is not checked a second time. A server that is away is an error at once where
    somebody typed the command, and waited for in a run that a worker started and in a sweep's later children.

    Args:
        config: of the run.
        serve: start a Prefect server for this process, unless the user's settings name one, once the input is found
            good; the checks that need servers go on beside its start.

    Raises:
        InputError: the first thing that is wrong, where it is and what to do.
    """
    from cdpo_core.data.lengths import check_policy_text
    from cdpo_core.data.prepare import check_source

    identity = config.model_dump_json()
    if identity in _passed:
        return
    _check_machine(config)
    _check_words(config)
    for field, base, revision, heads, trusted in _models(config):
        _check_model(field, base, revision, heads, trusted)
    check_policy_text(config)
    check_source(config)
    if serve:
        start_prefect_server(cdpo_home() / "logs")
        # What the flows import takes a second that would otherwise come before the server's start.
        import flows.experiment  # noqa: F401
    store = store_of(config)
    when_there(store.uri, store.probe)
    if not is_own():
        when_there("Prefect", _check_prefect)
    Tracker.open(config.tracking, store, cdpo_home())
    wait_until_ready()
    _passed.add(identity)


def _check_machine(config: ExperimentConfig) -> None:
    if config.compute.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "there is no CUDA device here that torch can use",
            where="compute.device = cuda",
            fix="set it to `auto` or `cpu`, or install a torch built for this machine's GPU",
        )


def _check_prefect() -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from tasks.prefect_patience import server_error

    url = PREFECT_API_URL.value()
    if not url:  # the first flow starts a temporary server
        return
    if without_secrets(url) != url:
        raise InputError(
            "the Prefect server's address holds credentials",
            where=f"PREFECT_API_URL = {without_secrets(url)}",
            fix="take them out, and set PREFECT_API_AUTH_STRING",
        )
    error = server_error()
    if error is not None:
        raise ServerAway(
            f"the Prefect server cannot be reached: {without_secrets(str(error))}",
            where=f"PREFECT_API_URL = {without_secrets(url)}",
            fix="start it (`cdpo up`), or unset PREFECT_API_URL: the run then starts a temporary server",
        )
    with get_client(sync_client=True) as client:
        _check_prefect_login(client, url)


def _check_prefect_login(client: SyncPrefectClient, url: str) -> None:
    """The health check needs no login; this does."""
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        client.api_version()
    except PrefectHTTPStatusError as error:
        if error.response.status_code != 401:
            raise
        given = "refuses this login" if "PREFECT_API_AUTH_STRING" in os.environ else "asks for a login"
        raise InputError(f"the Prefect server {given}", where=f"PREFECT_API_URL = {url}", fix=FIX) from None


def _check_words(config: ExperimentConfig) -> None:
    """Bases that are words and not models: each must fit what is to be done with it."""
    if config.policy.base == "scratch" and not config.sft.train:
        raise InputError(
            "a policy from scratch needs training, and sft.train is false",
            where="sft.train",
            fix="set it to true, or give the folder or hub id of a ready policy in policy.base",
        )
    _check_trust(config)
    if config.oracle_scorers:
        return
    if not config.reward.train and config.reward.base in RESERVED_BASES:
        raise _untrained("reward", config.reward.base)
    for at, item in enumerate(config.constraints):
        if item.train and item.base == SHARED and not config.reward.train:
            raise InputError(
                "a ready reward model has no backbone to share with a cost model that is to be trained",
                where=f"constraints.{at}.base",
                fix="set it to `sft`, or train the reward model too",
            )
        if not item.train and (item.base in RESERVED_BASES or (item.base == SHARED and config.reward.train)):
            raise _untrained(f"constraints.{at}", item.base)


def _check_trust(config: ExperimentConfig) -> None:
    """Code is trusted of a model that is named beside it, and of no other."""
    switches: dict[str, PolicyConfig | RewardConfig | ConstraintConfig]
    switches = {"policy": config.policy, "reward": config.reward}
    switches |= {f"constraints.{at}": item for at, item in enumerate(config.constraints)}
    for section, item in switches.items():
        if item.trust_remote_code and item.base in (*RESERVED_BASES, SHARED):
            raise InputError(
                f"{section} names no model whose code could run: its base is {item.base!r}",
                where=f"{section}.trust_remote_code",
                fix="leave it out: a scorer from `sft` has the policy's, a cost that shares `reward` the reward's",
            )


def _untrained(section: str, base: str) -> InputError:
    return InputError(
        f"{section}.train is false, but its base {base!r} is no ready model",
        where=f"{section}.base",
        fix="give the folder or hub id of a ready model, or set train to true",
    )


def _models(config: ExperimentConfig) -> Iterator[tuple[str, str, str, list[str], bool]]:
    """Each model from outside: its field, base, revision, the scores that it must give as it is, may its code run."""
    if config.policy.base != "scratch":
        yield "policy.base", config.policy.base, config.policy.revision, [], config.policy.trust_remote_code
    if config.oracle_scorers:
        return
    if config.reward.base not in RESERVED_BASES:
        shared = [item.name for item in config.constraints if item.base == SHARED]
        heads = [] if config.reward.train else ["reward", *shared]
        yield "reward.base", config.reward.base, config.reward.revision, heads, config.reward.trust_remote_code
    for at, item in enumerate(config.constraints):
        if item.base not in (*RESERVED_BASES, SHARED):
            heads = [] if item.train else [item.name]
            yield f"constraints.{at}.base", item.base, item.revision, heads, item.trust_remote_code


def _check_model(field: str, base: str, revision: str, heads: list[str], trusted: bool) -> None:
    from cdpo_core.models.checkpoints import check_model, check_own_code, is_local, local_folder

    try:
        check_model(base, revision)
        if is_local(base) and not trusted:
            check_own_code(local_folder(base))
        if heads and is_local(base):
            from cdpo_core.models.ready_scorer import check_ready_scorer

            check_ready_scorer(local_folder(base), heads)
    except InputError as error:
        raise InputError(f"{field}: {error.what}", where=error.where, fix=error.fix) from error

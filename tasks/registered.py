"""The registered policies, as the store's upkeep asks MLflow for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpo_core.errors import InputError
from tasks.mlflow_connection import FIX, mlflow_errors, reader, without_secrets

if TYPE_CHECKING:
    from cdpo_core.config import TrackingConfig

PAGE = 1000
RUNS_ASKED_FOR = 50
NOT_ASKED = "--tracking.enabled false"


@dataclass(frozen=True)
class Version:
    """One registered policy.

    Attributes:
        model: the registered model's name.
        version: its number there.
        digest: the policy's digest.
        aliases: of the version.
    """

    model: str
    version: str
    digest: str
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        """`model v3 (champion)`."""
        return f"{self.model} v{self.version}" + (f" ({', '.join(self.aliases)})" if self.aliases else "")


def registered_policies(tracking: TrackingConfig, home: Path, tracked: Iterable[Mapping[str, str]]) -> list[Version]:
    """Every policy that is registered in MLflow, or [] when tracking is off (`--tracking.enabled false`).

    Args:
        tracking: where MLflow is.
        home: the state folder, for MLflow without a server.
        tracked: {run_id, uri} of the store's runs, the latest first.

    Raises:
        InputError: MLflow cannot be asked, or it knows none of the store's runs, so that it is another one.
    """
    if not tracking.enabled:
        return []
    client, uri = reader(tracking, home)
    with mlflow_errors(InputError, without_secrets(uri), FIX):
        _check_it_is_theirs(client, uri, tracked)
        return [] if client is None else list(_versions(client))


def _versions(client: Any) -> Iterator[Version]:
    token = None
    aliases: dict[str, dict[str, list[str]]] = {}
    while True:
        page = client.search_model_versions(max_results=PAGE, page_token=token)
        for found in page:
            digest = found.tags.get("policy.digest")
            if digest:
                if found.name not in aliases:
                    aliases[found.name] = _aliases(client, found.name)
                names = aliases[found.name].get(str(found.version), [])
                yield Version(found.name, str(found.version), digest, tuple(sorted(names)))
        token = page.token
        if not token:
            return


def _aliases(client: Any, model: str) -> dict[str, list[str]]:
    by_version: dict[str, list[str]] = {}
    for alias, version in client.get_registered_model(model).aliases.items():
        by_version.setdefault(str(version), []).append(alias)
    return by_version


def _check_it_is_theirs(client: Any, uri: str, tracked: Iterable[Mapping[str, str]]) -> None:
    """Whoever tracked the store's runs must be who is asked: each address in the records is answered for."""
    by_address: dict[str, list[str]] = {}
    for place in tracked:
        if place.get("run_id"):
            by_address.setdefault(place.get("uri", ""), []).append(place["run_id"])
    for address, run_ids in by_address.items():
        if client is None or not any(_knows(client, run_id) for run_id in islice(run_ids, RUNS_ASKED_FOR)):
            raise InputError(
                f"{len(run_ids)} runs of this store were tracked by an MLflow that is not the one asked "
                f"({without_secrets(uri)}), so which policies are registered cannot be known",
                where=f"tracked by {address}",
                fix=f"set MLFLOW_TRACKING_URI to it; or, if none of its registered policies is needed, {NOT_ASKED}",
            )


def _knows(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return False
        raise
    return True

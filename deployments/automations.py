"""What Prefect's server does by itself for runs that can no longer speak: it ends them as Crashed.

A killed process tells nobody, so its run would stay Running for ever. A run that lives sends a heartbeat every
HEARTBEAT_SECONDS; one that misses three of them in a row is dead, or cut off from the server. What is cut off goes on
and overwrites the Crashed with its real end.

Each run has heartbeats of its own, the nested flows (prepare, align, ...) too, so each ends by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from tasks.environment import HEARTBEAT_SECONDS, RUN_TAG

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

# The fourth heartbeat is late, whichever of the three before it was lost with an outage of a minute.
SILENCE = timedelta(seconds=4 * HEARTBEAT_SECONDS)
# A container's image may have to be pulled first.
START = timedelta(minutes=15)
SILENT, NEVER_STARTED = "cdpo: a run that fell silent has crashed", "cdpo: a run that never started has crashed"
RETRY = (
    "Retry this run (the button above, or `prefect flow-run retry ID`): it continues from the store, "
    "nothing that is done is computed again."
)


def make_automations(client: SyncPrefectClient) -> list[str]:
    """Make the project's automations, or update those that differ; whether one is paused stays as the operator set it.

    They watch the runs that carry the tag `cdpo` and no others.

    Args:
        client: of the server; its user must be allowed to make automations.

    Returns:
        Their names.
    """
    return [_make(client, item) for item in _automations()]


def _make(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    from prefect.events.schemas.automations import AutomationCore

    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
    for present in found[:1]:
        there = AutomationCore.model_validate(present.model_dump())
        wanted = wanted.model_copy(update={"enabled": present.enabled})
        if _content(there) != _content(wanted):
            client.update_automation(present.id, wanted)
    for extra in found[1:]:  # two that bootstrapped a new server at once
        client.delete_automation(extra.id)
    return wanted.name


def _content(automation: AutomationCore) -> dict[str, object]:
    return automation.model_dump(mode="json", exclude={"owner_resource", "tags"})


def _automations() -> Iterator[AutomationCore]:
    yield _crashed_without(
        SILENT,
        f"No heartbeat for {SILENCE.seconds} s: Crashed: its process was killed, or its machine is gone.",
        {"prefect.flow-run.heartbeat", "prefect.flow-run.Running"},
        SILENCE,
        f"No sign of life for {SILENCE.seconds} s: its process was killed, or its machine is gone. {RETRY}",
    )
    yield _crashed_without(
        NEVER_STARTED,
        f"A run that a worker took and did not start within {START.seconds // 60} min is Crashed.",
        {"prefect.flow-run.Pending"},
        START,
        f"A worker took this run and did not start it within {START.seconds // 60} min. {RETRY}",
    )


def _crashed_without(name: str, description: str, after: set[str], within: timedelta, message: str) -> AutomationCore:
    """Crashed, for each run that shows no event of its own for a while after one of these."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=name,
        description=description,
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{RUN_TAG}"},
            after=after,
            expect={"prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)],
    )

"""The automations on a real server: made once, updated where they differ, the operator's choice kept."""

from __future__ import annotations

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import Automation, AutomationCore

from deployments.automations import make_automations


def _all(client: SyncPrefectClient, names: list[str]) -> dict[str, Automation]:
    found = [item for item in client.read_automations() if item.name in names]
    assert len(found) == len(names)
    return {item.name: item for item in found}


def _core(automation: Automation, **changes: str) -> AutomationCore:
    return AutomationCore.model_validate({**automation.model_dump(exclude={"id", "owner_resource"}), **changes})


def test_automations_are_made_once_and_updated_where_they_differ(prefect_server: str) -> None:
    with get_client(sync_client=True) as client:
        names = make_automations(client)
        first = _all(client, names)
        assert make_automations(client) == names
        assert _all(client, names) == first

        silent = first[names[0]]
        client.update_automation(silent.id, _core(silent, description="another"))
        client.pause_automation(silent.id)
        make_automations(client)
        again = _all(client, names)[names[0]]
        assert again == silent.model_copy(update={"enabled": False})

        client.create_automation(_core(silent))
        make_automations(client)
        assert list(_all(client, names)) == list(first)
        for item in _all(client, names).values():
            client.delete_automation(item.id)

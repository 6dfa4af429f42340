"""The store at an address, for its upkeep."""

from __future__ import annotations

from cdpo_core.errors import InputError
from cdpo_core.local_store import LocalStore
from cdpo_core.upkeep.local_shelves import LocalShelves
from cdpo_core.upkeep.shelves import Shelves
from tasks.environment import cdpo_home, default_store
from tasks.storage import open_to_read


def open_shelves(uri: str) -> Shelves:
    """The store at an address, for its upkeep.

    Args:
        uri: see `open_store`; "" is the default one (CDPO_STORE, else under CDPO_HOME).

    Raises:
        InputError: see `open_to_read`; or there is no such folder.
    """
    store = open_to_read(uri or default_store())
    if not isinstance(store, LocalStore):
        from tasks.s3_shelves import S3Shelves
        from tasks.s3_store import S3Store

        assert isinstance(store, S3Store)
        return S3Shelves.of(store, cdpo_home() / "cache")
    if not store.root.is_dir():
        raise InputError("there is no store in this folder", where=store.uri, fix="name another one with --store URI")
    return LocalShelves(store.root)

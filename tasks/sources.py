"""The user's data set as an input artifact: files by content, a hub data set by revision."""

from __future__ import annotations

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import DataConfig


def source_ref(data: DataConfig) -> ArtifactRef:
    """A reference to the data files or to the hub data set at its resolved revision.

    Raises:
        InputError: the source is not set, does not exist, holds no data, or cannot be reached.
    """
    from cdpo_core.data.sources import source_path
    from cdpo_core.outside import DATA

    path, digest = source_path(data)
    return ArtifactRef(uri=str(path), digest=f"{DATA}{digest}", kind="external")

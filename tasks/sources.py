"""The user's data set as an input artifact: files by content, a hub data set by revision."""

from __future__ import annotations

from cdpo_core.artifacts import ArtifactRef, external_ref
from cdpo_core.config import DataConfig


def source_ref(data: DataConfig) -> ArtifactRef:
    """A reference to the data files or to the hub data set at its resolved revision.

    Raises:
        InputError: the source cannot be found or reached.
    """
    from cdpo_core.data.sources import source_path

    path, digest = source_path(data)
    return ArtifactRef(uri=str(path), digest=digest, kind="external") if digest else external_ref(path)

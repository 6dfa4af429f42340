"""Models from outside as input artifacts: folders by content, hub models by resolved revision."""

from __future__ import annotations

from cdpo_core.artifacts import ArtifactRef, external_ref

# What a scorer's base may be that is no model from outside.
RESERVED_BASES = ("sft", "scratch")


def external_model(base: str, revision: str = "") -> ArtifactRef:
    """A model folder by its content, or a hub model by its resolved revision.

    Raises:
        InputError: the folder is no model, or the hub has none or cannot be reached.
    """
    from cdpo_core.models.checkpoints import check_model_folder, is_local, local_folder

    folder = local_folder(base, revision)
    check_model_folder(folder)
    if is_local(base):
        return external_ref(folder)
    # A snapshot's folder is named by its commit, which names its content.
    return ArtifactRef(uri=str(folder), digest=f"{base}@{folder.name}", kind="external")


def number_format(base: str, revision: str = "") -> str:
    """The number format of a model from outside: what its config says, else what its weights are in."""
    from cdpo_core.models.checkpoints import local_folder, weights_format

    return weights_format(local_folder(base, revision))

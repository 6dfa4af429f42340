"""What comes from outside: data files and models, referred to by content or by resolved revision."""

from __future__ import annotations

from pathlib import Path

from cdpo_core.artifacts import ArtifactRef, external_ref
from cdpo_core.errors import InputError

PATH_STARTS = ("/", ".", "~")


def is_path(source: str) -> bool:
    """Whether a model is named by a path: one that exists, or one that looks like one."""
    return source.startswith(PATH_STARTS) or Path(source).expanduser().exists()


def external_model(base: str, revision: str = "") -> ArtifactRef:
    """A model folder by its content, or a hub model by its resolved revision.

    Raises:
        InputError: the folder is not a model, or the hub cannot be reached.
    """
    if is_path(base):
        from cdpo_core.models.policy import check_model_folder

        check_model_folder(Path(base).expanduser())
        return external_ref(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(base, revision=revision or None, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.msgpack"])
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"the model {base!r} is neither a folder here nor a hub id that can be reached",
            where=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            fix="give a local folder in the Hugging Face format, or check the id and the network",
        ) from error
    return ArtifactRef(uri=folder, digest=f"{base}@{Path(folder).name}", kind="external")

"""A look at a policy: responses drawn to prompts given by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdpo_core.config import PolicyConfig


def draw(
    policy: str,
    prompts: Sequence[str],
    number: int,
    temperature: float,
    seed: int,
    settings: PolicyConfig,
    store_uri: str = "",
) -> Iterator[tuple[str, list[str]]]:
    """Each prompt with `number` responses.

    Args:
        policy: a reference as `cdpo run` prints it, or a Hugging Face folder or hub id.
        prompts: the prompts' texts.
        number: responses for each prompt.
        temperature: of the draw.
        seed: of the draw.
        settings: how prompts are written, for a model that does not bring it along.
        store_uri: see `find_policy`.

    Raises:
        InputError: the policy cannot be found or loaded.
    """
    from cdpo_core.evaluation.sampling import sample
    from cdpo_core.models.policy import load_policy

    folder = _folder(policy, store_uri)
    has_settings = Path(folder).joinpath("policy.json").is_file()
    model = load_policy(folder, config_policy=None if has_settings else settings)
    drawn = sample(
        model,
        model.encode_prompts(prompts),
        number,
        prompt_ids=list(prompts),
        seed_stream=(seed, "cdpo sample"),
        temperature=temperature,
    )
    for prompt, responses in zip(prompts, drawn, strict=True):
        yield prompt, [model.decode(response.tokens) for response in responses]


def _folder(policy: str, store_uri: str) -> str:
    """The folder or hub id to load; a reference's files come out of the store."""
    from cdpo_core.errors import InputError
    from flows.export import find_policy

    path = Path(policy).expanduser()
    if path.is_dir():
        return str(path)
    if _is_reference(policy):
        store, manifest = find_policy(policy, store_uri)
        return str(store.fetch(manifest))
    if path.exists():
        return str(path)
    if policy.startswith(("/", ".", "~")):
        raise InputError("there is no such folder", where=policy, fix="name a policy's reference or a model folder")
    _check_hub(policy)
    return policy


def _is_reference(policy: str) -> bool:
    """Whether it looks like a reference into the store: what such a one misspells is never asked of the hub."""
    from cdpo_core import pipeline

    stages = "|".join({item.name for item in vars(pipeline).values() if isinstance(item, pipeline.Stage)})
    whole = policy.endswith(".json") or "/stages/" in policy or policy.startswith(("round/", "sft/"))
    return whole or bool(re.fullmatch(rf"(?:{stages})/[0-9a-fA-F]+", policy))


def _check_hub(name: str) -> None:
    """Ask for a model once; transformers would try for half a minute and print each try."""
    from cdpo_core.errors import InputError
    from cdpo_core.models.checkpoints import check_model, is_offline
    from flows.export import HOW_TO_NAME

    try:
        check_model(name)
    except InputError as error:
        if is_offline() or error.__cause__ is None:
            raise
        raise InputError(
            f"this is no reference and no folder, and no hub id that can be loaded ({type(error.__cause__).__name__})",
            where=name,
            fix=f"{HOW_TO_NAME}, or a model folder; for a hub id, check its spelling and the network",
        ) from error

"""A look at a policy: responses drawn to prompts given by hand, decoded as it was tested."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cdpo_core.evaluation.decoding import Decoding, decoding_words, departures, exported_decoding

if TYPE_CHECKING:
    from cdpo_core.config import PolicyConfig
    from cdpo_core.models.policy import Policy


@dataclass(frozen=True)
class Drawer:
    """A policy that answers prompts.

    Attributes:
        model: the policy.
        temperature: of the draw.
        said: what the user should know of the settings in use, in lines; warnings begin with `warning: `.
    """

    model: Policy
    temperature: float
    said: tuple[str, ...]

    def draw(self, prompts: Sequence[str], number: int, seed: int) -> Iterator[tuple[str, list[str]]]:
        """Each prompt with `number` responses."""
        from cdpo_core.evaluation.sampling import sample

        drawn = sample(
            self.model,
            self.model.encode_prompts(prompts),
            number,
            prompt_ids=list(prompts),
            seed_stream=(seed, "cdpo sample"),
            temperature=self.temperature,
        )
        for prompt, responses in zip(prompts, drawn, strict=True):
            yield prompt, [self.model.decode(response.tokens) for response in responses]


def open_drawer(
    policy: str,
    temperature: float | None,
    settings: PolicyConfig,
    chosen: Collection[str] = (),
    store_uri: str = "",
) -> Drawer:
    """A policy, decoded as it was tested unless the user says otherwise.

    Args:
        policy: a reference as `cdpo run` prints it, or a Hugging Face folder or hub id.
        temperature: of the draw; None takes the one it was tested at, else 1.
        settings: how prompts are written, for a model that does not bring it along.
        chosen: fields of `settings` that the user set; these hold for every model.
        store_uri: see `find_policy`.

    Raises:
        InputError: the policy cannot be found or loaded.
    """
    from cdpo_core.models.policy import load_policy

    folder, tested, is_certified = _found(policy, store_uri)
    has_settings = Path(folder).joinpath("policy.json").is_file()
    given: Any = SimpleNamespace(**{name: getattr(settings, name) for name in {*chosen, "trust_remote_code"}})
    used: dict[str, Any] = {"max_response_tokens": tested["max_new_tokens"]} if tested else {}
    if has_settings:
        given = SimpleNamespace(**{**used, **vars(given)})
    model = load_policy(folder, config_policy=given if has_settings else settings)
    degree = temperature or (tested["temperature"] if tested else 1.0)
    decoding = Decoding(
        degree,
        model.max_response_tokens,
        model.max_prompt_tokens,
        model.template,
        tuple(tested["ends"] if tested else ()),
    )
    return Drawer(model, degree, tuple(_said(decoding.record(), tested, is_certified)))


def _said(used: dict[str, Any], tested: dict[str, Any] | None, is_certified: bool) -> list[str]:
    """The settings in use, and a warning where they are not those of the policy's test."""
    if tested is None:
        return [f"decoding: {decoding_words(used)} (no test of this policy says how it is decoded)"]
    word = "certified" if is_certified else "tested"
    told = {name: used[name] for name in ("temperature", "max_new_tokens", "max_prompt_tokens", "template")}
    if changed := departures(tested, told):
        return [
            f"decoding: {decoding_words(used)}",
            f"warning: it was {word} with other settings, and what was shown of it does not hold here: "
            + "; ".join(changed),
        ]
    return [f"decoding: {decoding_words(used)}, as {word}"]


def _found(policy: str, store_uri: str) -> tuple[str, dict[str, Any] | None, bool]:
    """The folder or hub id to load, the decoding it was tested with (None: of no test), and whether it passed."""
    from cdpo_core.errors import InputError
    from flows.export import decoding_from, find_policy, result_of

    path = Path(policy).expanduser()
    if path.is_dir():
        return str(path), exported_decoding(path), False
    if _is_reference(policy):
        store, manifest = find_policy(policy, store_uri)
        result = result_of(store, manifest)
        return str(store.fetch(manifest)), decoding_from(result), bool(result and result["status"] == "certified")
    if path.exists():
        return str(path), None, False
    if policy.startswith(("/", ".", "~")):
        raise InputError("there is no such folder", where=policy, fix="name a policy's reference or a model folder")
    _check_hub(policy)
    return policy, None, False


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

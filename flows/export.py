"""A policy out of the store: found by its reference, written as a Hugging Face folder with a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import Manifest, Store
from cdpo_core.errors import InputError
from cdpo_core.evaluation.decoding import DECODING, GENERATION, decoding_of, decoding_words, generation_settings
from cdpo_core.evaluation.result import mean_figures, spending_in_words, tail_figures, tested_on, verdict
from cdpo_core.models.checkpoints import write_json
from cdpo_core.plain_text import markdown_text

RECORDS = "results/"
HOW_TO_NAME = "give the policy's reference as `cdpo run` prints it, <store>/stages/<stage>/<key>.json"


def find_policy(reference: str, store_uri: str = "") -> tuple[Store, Manifest]:
    """The store and the manifest of a policy.

    Args:
        reference: `<store>/stages/<stage>/<key>.json`, or `<stage>/<beginning of the key>` in one store.
        store_uri: the store of a short reference; "" is the default one (CDPO_STORE, else under CDPO_HOME).

    Raises:
        InputError: the reference is none, names nothing or several things, or names something else than a policy;
            or the store does not answer within 30 seconds.
    """
    from tasks.environment import default_store
    from tasks.storage import open_to_read

    address, found, place = reference.removeprefix("cdpo://").removesuffix(".json").rpartition("/stages/")
    stage, _, key = place.partition("/")
    if not key:
        raise InputError("this is no reference to a policy", where=reference, fix=HOW_TO_NAME)
    here = store_uri or default_store()
    try:
        store = open_to_read(address if found else here)
    except InputError:
        # A home that was moved still holds what its old references name.
        if not found or address.startswith("s3://") or Path(address).exists() or not Path(here).is_dir():
            raise
        store = open_to_read(here)
    manifest = store.find(stage, key) if found else _by_beginning(store, stage, key)
    if manifest is None:
        raise InputError("the store holds nothing under this reference", where=reference, fix=HOW_TO_NAME)
    if manifest.kind != "policy":
        raise InputError(f"this is a {manifest.kind} artifact and not a policy", where=reference, fix=HOW_TO_NAME)
    return store, manifest


def export_policy(reference: str, folder: Path, store_uri: str = "") -> dict[str, Any] | None:
    """Write a policy to a new folder that transformers loads, with a model card that carries its certificate.

    Its generation config lets transformers draw from the distribution that was certified, and from no other.

    Args:
        reference: see `find_policy`.
        folder: made by this; must not exist or be empty.
        store_uri: see `find_policy`.

    Returns:
        The result record of the run that chose this policy, or None if no finished run did.

    Raises:
        InputError: the reference cannot be resolved, or the folder is taken or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("the folder to export to is not empty", where=str(folder), fix="name a new one")
    store, manifest = find_policy(reference, store_uri)
    files = store.fetch(manifest)
    result = result_of(store, manifest)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            whole = Path(scratch) / "policy"
            for name in manifest.files:
                target = whole / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files / name, target)
            _write_decoding(whole, result)
            card = model_card(manifest, result) + _dated(whole)
            (whole / "README.md").write_text(card, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            whole.rename(folder)
    except OSError as error:
        raise InputError(
            f"the folder cannot be written: {error.strerror}", where=str(folder), fix="name another"
        ) from error
    return result


def result_of(store: Store, manifest: Manifest) -> dict[str, Any] | None:
    """The record of a run that returned this policy, from the store or this machine's reports.

    A certified one goes first, then the newest.
    """
    from tasks.environment import cdpo_home

    results = [store.get_record(name) for name in store.record_names(RECORDS)]
    results += [json.loads(path.read_text()) for path in sorted(cdpo_home().glob("reports/*/result.json"))]
    mine = [item for item in results if item and (item.get("policy") or {}).get("digest") == manifest.digest]
    return min(mine, key=lambda item: (item["status"] != "certified", -item.get("ended_ms", 0)), default=None)


def decoding_from(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How the run that returned a policy drew its responses when it was tested; None without a test."""
    return ((result or {}).get("certificate") or {}).get("decoding")


def _write_decoding(folder: Path, result: Mapping[str, Any] | None) -> None:
    """How the policy is decoded, for transformers; and, where it was tested so, for `cdpo sample`.

    A policy that was never tested is drawn from as it is (temperature 1), not as its base once was.
    """
    tested = decoding_from(result)
    if tested is None:
        longest = json.loads((folder / "policy.json").read_text())["max_response_tokens"]
        tested = decoding_of(folder, 1.0, longest).record()
    else:
        write_json(folder / DECODING, tested)
    write_json(folder / GENERATION, generation_settings(folder, tested))


def _dated(folder: Path) -> str:
    """A line on the date that the policy reads in every prompt, if its chat template writes one."""
    day = json.loads((folder / "policy.json").read_text()).get("template_date")
    if not day:
        return ""
    return f"\nIts chat template writes the date {day} on every day, as in all that is reported here.\n"


def model_card(manifest: Manifest, result: Mapping[str, Any] | None) -> str:
    """The card of an exported policy: verdict, certificate, figures, where it comes from (markdown)."""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dpo, constrained-dpo, alignment]\n---",
        "# A policy aligned by Constrained DPO",
        markdown_text(verdict(result))
        if result
        else "No finished run returned this policy: **it carries no certificate**.",
    ]
    if result:
        parts += [
            "## Certificate",
            _certificates(result),
            "## Held-out test prompts",
            _figures(result, mean_figures(result)),
        ]
        parts += ["## Beyond the mean", _figures(result, tail_figures(result))]
    parts += ["## Origin", _origin(manifest, result)]
    return "\n\n".join(parts) + "\n"


def _by_beginning(store: Store, stage: str, key: str) -> Manifest | None:
    matches = [manifest for manifest in store.manifests() if manifest.stage == stage and manifest.key.startswith(key)]
    if len(matches) > 1:
        raise InputError(
            f"{len(matches)} artifacts begin like this", where=f"{stage}/{key}", fix="give more characters of the key"
        )
    return matches[0] if matches else None


def _certificates(result: Mapping[str, Any]) -> str:
    lines = ["| cost | limit | mean | upper bound | delta | method | prompts | passed |", "|---" * 8 + "|"]
    for item in result["constraints"]:
        certificate = item.get("certificate")
        if certificate is None:
            lines.append(f"| {item['name']} | {item['limit']:g} | not tested | | | | | no |")
            continue
        prompts = tested_on(certificate).replace(" held-out prompts", "")
        lines.append(
            f"| {item['name']} | {item['limit']:g} | {certificate['mean']:.4f} | {certificate['upper']:.4f} | "
            f"{certificate['delta']:.3g} | {certificate['method']} | {prompts} | "
            f"{'yes' if certificate['passed'] else 'no'} |"
        )
    first = result.get("certificate") or {}
    spent, spending = first.get("spent"), spending_in_words(first)
    note = (
        "It bounds the *cost model's* mean cost on prompts like the held-out ones; the cost model itself can be wrong."
    )
    if spent:
        note += f" Tests these prompts have been spent on: {spent}."
    if spending:
        note += f" {spending}"
    if decoding := decoding_from(result):
        drawn = markdown_text(decoding_words(decoding))
        note += f" It is about responses drawn at {drawn}, as generation_config.json says;"
        note += " another temperature, length or template is another policy."
    if failed := result.get("instrument"):
        note += (
            " **An instrument does not measure**: " + "; ".join(markdown_text(item["what"]) for item in failed) + "."
        )
    return "\n".join(lines) + f"\n\n{note}"


def _figures(result: Mapping[str, Any], heads: Mapping[str, str]) -> str:
    """A row for each method, a column for each figure; empty where a method has none."""
    methods = {**result["baselines"], "this policy": result.get("test")}
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, figures in methods.items():
        if figures:
            known = (figures.get(key) for key in heads.values())
            cells = ("" if figure is None else f"{figure['mean']:.3f}" for figure in known)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _origin(manifest: Manifest, result: Mapping[str, Any] | None) -> str:
    lines = [f"- artifact digest: `{manifest.digest}`", f"- stage: {manifest.stage}, computed {manifest.created}"]
    if result:
        lambdas = ", ".join(f"{item['name']} {item['lambda']:g}" for item in result["constraints"])
        lines.append(f"- λ: {lambdas}; seed {result['seed']}")
    lines += [f"- {name} {version}" for name, version in sorted(manifest.versions.items())]
    return "\n".join(lines)

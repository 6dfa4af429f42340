"""What lengths cut: in figures by the stages that write text as tokens, in words for plan, result and report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cdpo_core.models.checkpoints import write_json

if TYPE_CHECKING:
    from cdpo_core.models.policy import Policy

FILE: Final = "cut.json"
MANY: Final = 0.05
"""The share of cut texts, and of cut responses, above which it is a warning."""

Counts = Mapping[str, Any]


def policy_cuts(policy: Policy, prompts: list[str], responses: list[str]) -> dict[str, int]:
    """How many of the distinct texts the policy's lengths cut, and these lengths."""
    lengths = {"max_prompt_tokens": policy.max_prompt_tokens, "max_response_tokens": policy.max_response_tokens}
    return {**policy.count_cut(prompts, responses), **lengths}


def write_cuts(counts: Counts, folder: Path) -> None:
    """Write cut.json beside what was made of the texts."""
    write_json(folder / FILE, dict(counts))


def read_cuts(folder: Path) -> dict[str, Any]:
    """As `write_cuts` wrote it."""
    found: dict[str, Any] = json.loads((folder / FILE).read_text())
    return found


def policy_lines(counts: Counts, about: str = "") -> list[str]:
    """The policy's counts, a line each for prompts and responses.

    Args:
        counts: as `policy_cuts` gives them.
        about: what a line ends with.
    """
    kinds = (("prompt", "loses the left end of its words"), ("response", "loses its right end"))
    return [
        f"{counts[f'{kind}s_cut']:,} of {counts[f'{kind}s']:,} {kind}s are cut to policy.max_{kind}_tokens = "
        f"{counts[f'max_{kind}_tokens']}: a longer one {loses}{about}"
        for kind, loses in kinds
    ]


def cut_lines(cut: Mapping[str, Counts]) -> list[str]:
    """Every count of a result's `cut` record, a line each."""
    lines = policy_lines(cut["policy"]) if cut.get("policy") else []
    for name, counts in (cut.get("scorers") or {}).items():
        texts = f"of {counts['texts']:,} texts that the {name} model read"
        lines.append(f"{counts['prompts_cut']:,} {texts} lost the left end of their prompt")
        lines.append(f"{counts['responses_cut']:,} {texts} lost the right end of their response")
    return lines


def cut_warnings(cut: Mapping[str, Counts]) -> list[str]:
    """The lines of which more than MANY of the texts were cut."""
    shares = []
    if counts := cut.get("policy"):
        shares += [counts[f"{kind}_cut"] / max(counts[kind], 1) for kind in ("prompts", "responses")]
    for counts in (cut.get("scorers") or {}).values():
        shares += [counts[f"{kind}_cut"] / max(counts["texts"], 1) for kind in ("prompts", "responses")]
    return [f"{line} ({share:.0%})" for line, share in zip(cut_lines(cut), shares, strict=True) if share > MANY]

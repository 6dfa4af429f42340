"""Splits by prompt: preferences apart from the pool, and the pool into its four parts.

The draw of the splits moves a policy's mean cost more than the certificate's margin does, so the
pool is stratified by the reference policy's mean costs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from cdpo_core.errors import InputError
from cdpo_core.randomness import numpy_stream
from cdpo_core.tables import write_table

if TYPE_CHECKING:
    from cdpo_core.config import SplitSizes
    from cdpo_core.stages import Runtime, Slice

POOL_SPLITS: Final = ("policy", "selection", "certificate", "test")
DRAWS: Final = 64
FITTED: Final = "preferences (fitted)"
HELD_OUT: Final = "preferences (held out)"
FEWEST: Final = {FITTED: 4, HELD_OUT: 2, "policy": 4, "selection": 4, "certificate": 4, "test": 2}
"""Fewest prompts with which each part can do its work at all; more is better."""


def make_splits(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the pool's prompts as policy, selection, certificate and test prompts.

    Reads `seed` and `data.splits`; inputs `data` and `scores` (of the reference's responses to the
    pool). Writes splits.parquet (prompt_id, split) and summary.json ({split: {prompts, mean_cost}},
    with several costs one mean for each).

    Raises:
        InputError: a split would get too few prompts.
        ValueError: the scores lack a prompt of the pool.
    """
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet", columns=["prompt_id", "kind", "split"])
    pool = prompts[prompts["split"] == "pool"].drop(columns="split").reset_index(drop=True)
    scores = pd.read_parquet(inputs["scores"] / "scores.parquet")
    names = [name for name in scores.columns if name.startswith("cost_")]
    means = scores.groupby("prompt_id")[names].mean().reindex(pool["prompt_id"])
    costs = means.to_numpy("float64")
    if not np.isfinite(costs).all():
        bare = int((~np.isfinite(costs)).any(axis=1).sum())
        raise ValueError(f"{bare} prompts of the pool have no finite {', '.join(names)}")
    sizes = pool_sizes(len(pool), config.data.splits)
    refuse_small(sizes, len(prompts))
    pool["split"] = balanced_splits(pool["kind"].to_numpy(), costs, sizes, config.seed)
    write_table(pool[["prompt_id", "split"]], out / "splits.parquet")
    by_split = pd.DataFrame(costs, columns=names).groupby(pool["split"].to_numpy()).mean()
    summary = {}
    for name in POOL_SPLITS:
        mean = by_split.loc[[name]].to_numpy()[0].tolist()
        summary[name] = {"prompts": sizes[name], "mean_cost": mean[0] if len(mean) == 1 else mean}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def balanced_splits(kinds: np.ndarray, costs: np.ndarray, sizes: Mapping[str, int], seed: int) -> np.ndarray:
    """Of DRAWS stratified draws the one whose splits' mean costs [P, m] lie closest together (rerandomisation).

    One draw leaves a gap, because a prompt more or less of a kind moves a small split's mean.
    """
    generator = numpy_stream(seed, "splits")
    order = alike_order(kinds, costs)
    draws = [spread(order, sizes, generator) for _ in range(DRAWS)]
    gaps = [max(np.ptp([cost[draw == name].mean() for name in sizes]) for cost in costs.T.copy()) for draw in draws]
    return draws[int(np.argmin(gaps))]


def alike_order(kinds: np.ndarray, costs: np.ndarray) -> list[np.ndarray]:
    """Sorting keys, the most important first, by which neighbours are alike in kind [P] and in every cost [P, m].

    All costs but the last are cut into bands, as many of each as leaves every cost about equally fine; the last
    rises in one band and falls in the next, so that neighbours across a border are alike in it too.
    """
    bands = round(len(costs) ** (1 / costs.shape[1]))
    band = costs[:, :-1].argsort(axis=0, kind="stable").argsort(axis=0) * bands // len(costs)
    return [kinds, *band.T, np.where(band.sum(axis=1) % 2, -costs[:, -1], costs[:, -1])]


def split_preferences(
    strata: Sequence[str] | np.ndarray, splits: SplitSizes | Slice, held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the prompts whose labels the scorers learn from, evenly over the strata.

    Args:
        strata: a stratum for each prompt (its kind, where known), shape [prompts].
        splits: shares; `splits.preferences` of all prompts are chosen.
        held_out: share of the chosen ones that is kept from the scorers' fit.
        seed: the experiment's seed.

    Returns:
        (is a preferences prompt, is a held-out one), both bool [prompts]; the second implies the first.
    """
    sizes = split_sizes(len(strata), splits, held_out)
    parts = {FITTED: sizes[FITTED], HELD_OUT: sizes[HELD_OUT]}
    parts["pool"] = len(strata) - sum(parts.values())
    generator = numpy_stream(seed, "preferences")
    names = spread([np.asarray(strata), generator.random(len(strata))], parts, generator)
    return names != "pool", names == HELD_OUT


def spread(order: Sequence[np.ndarray], sizes: Mapping[str, int], generator: np.random.Generator) -> np.ndarray:
    """Deal items to parts of exact sizes, each part spread evenly over the sorted items.

    The i-th item of a part of size k falls at random into the i-th of k equal blocks of the sorted
    list, so two parts' means of a sorting key differ far less than those of a random draw.

    Args:
        order: sorting keys, the most important first, each [items].
        sizes: items of each part; they add up to the number of items.
        generator: the random stream.

    Returns:
        The part of each item, str objects, shape [items].
    """
    names = np.concatenate([np.full(size, name, dtype=object) for name, size in sizes.items()])
    places = [(np.arange(size) + generator.random(size)) / max(size, 1) for size in sizes.values()]
    dealt = names[np.argsort(np.concatenate(places), kind="stable")]
    parts = np.empty(len(dealt), dtype=object)
    parts[np.lexsort(tuple(reversed(order)))] = dealt
    return parts


def split_sizes(prompts: int, splits: SplitSizes | Slice, held_out: float) -> dict[str, int]:
    """Prompts of every part (FEWEST's names) when `prompts` are split by the configured shares."""
    preferences = round(splits.preferences * prompts)
    kept_out = round(held_out * preferences)
    return {
        FITTED: preferences - kept_out,
        HELD_OUT: kept_out,
        **pool_sizes(prompts - preferences, splits),
    }


def pool_sizes(pool: int, splits: SplitSizes | Slice) -> dict[str, int]:
    """Prompts of each of POOL_SPLITS, proportional to the shares, adding up to `pool` (largest remainders)."""
    shares = np.array([getattr(splits, name) for name in POOL_SPLITS])
    exact = pool * shares / shares.sum()
    sizes = np.floor(exact + 1e-9).astype(int)
    largest = np.argsort(-(exact - sizes), kind="stable")[: pool - int(sizes.sum())]
    sizes[largest] += 1
    return dict(zip(POOL_SPLITS, map(int, sizes), strict=True))


def refuse_small(sizes: Mapping[str, int], prompts: int) -> None:
    """Refuse splits that cannot do their work.

    Raises:
        InputError: with what each part gets and needs.
    """
    small = [name for name, size in sizes.items() if size < FEWEST[name]]
    if small:
        given = "; ".join(f"{name} {size} (needs {FEWEST[name]})" for name, size in sizes.items())
        raise InputError(
            f"too few prompts to split: {prompts} prompts leave {', '.join(small)} too small",
            where=f"data.splits: {given}",
            fix="give data with more prompts, or shift the shares in data.splits or data.held_out",
        )

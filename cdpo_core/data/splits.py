"""Splits by prompt: preferences apart from the pool, and the pool into its four parts.

The draw of the splits moves a policy's mean cost more than the certificate's margin does, so the
pool is stratified by the reference policy's mean costs. What is dealt are whole units (`near_duplicates`): prompts that
are one question in several spellings never stand on two sides.
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
    pool). Writes splits.parquet (prompt_id, unit, split) and summary.json ({split: {prompts, units,
    mean_cost}}, with several costs one mean for each).

    Raises:
        InputError: a split would get too few prompts.
        ValueError: the scores lack a prompt of the pool.
    """
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet", columns=["prompt_id", "kind", "unit", "split"])
    pool = prompts[prompts["split"] == "pool"].drop(columns="split").reset_index(drop=True)
    scores = pd.read_parquet(inputs["scores"] / "scores.parquet")
    names = [name for name in scores.columns if name.startswith("cost_")]
    means = scores.groupby("prompt_id")[names].mean().reindex(pool["prompt_id"])
    costs = means.to_numpy("float64")
    if not np.isfinite(costs).all():
        bare = int((~np.isfinite(costs)).any(axis=1).sum())
        raise ValueError(f"{bare} prompts of the pool have no finite {', '.join(names)}")
    sizes = pool_sizes(len(pool), config.data.splits)
    pool["split"] = balanced_splits(pool["kind"].to_numpy(), costs, sizes, config.seed, pool["unit"].to_numpy())
    refuse_small({name: pool.loc[pool["split"] == name, "unit"].nunique() for name in POOL_SPLITS}, len(prompts))
    write_table(pool[["prompt_id", "unit", "split"]], out / "splits.parquet")
    by_split = pd.DataFrame(costs, columns=names).groupby(pool["split"].to_numpy()).mean()
    counts = pool.groupby("split")["unit"].agg(["size", "nunique"])
    summary = {}
    for name in POOL_SPLITS:
        mean = by_split.loc[[name]].to_numpy()[0].tolist()
        prompts_units = dict(zip(("prompts", "units"), map(int, counts.loc[name]), strict=True))
        summary[name] = {**prompts_units, "mean_cost": mean[0] if len(mean) == 1 else mean}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def balanced_splits(
    kinds: np.ndarray, costs: np.ndarray, sizes: Mapping[str, int], seed: int, units: np.ndarray | None = None
) -> np.ndarray:
    """Of DRAWS stratified draws the one whose splits' mean costs [P, m] lie closest together (rerandomisation).

    One draw leaves a gap, because a prompt more or less of a kind moves a small split's mean. A unit is dealt whole and
    weighs as one: it is of its first prompt's kind and has its prompts' mean cost.

    Args:
        kinds: [P] the prompts' kinds.
        costs: [P, m] their mean costs.
        sizes: prompts of each split, which add up to P.
        seed: the experiment's seed.
        units: [P] labels; each prompt one of its own by default.
    """
    generator = numpy_stream(seed, "splits")
    rows, counts, first = _unit_rows(np.arange(len(kinds)) if units is None else units)
    means = np.zeros((len(counts), costs.shape[1]))
    np.add.at(means, rows, costs)
    means /= counts[:, None]
    order = alike_order(kinds[first], means)
    draws = [deal(order, counts, sizes, generator) for _ in range(DRAWS)]
    gaps = [max(_gap(cost, draw, sizes) for cost in means.T.copy()) for draw in draws]
    return draws[int(np.argmin(gaps))][rows]


def _gap(cost: np.ndarray, draw: np.ndarray, sizes: Mapping[str, int]) -> float:
    parts = [cost[draw == name] for name in sizes]
    return float(np.ptp([part.mean() for part in parts])) if all(map(len, parts)) else float("inf")


def _unit_rows(units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the unit of each prompt [P], prompts a unit [U], the first prompt of each [U]), units by first appearance."""
    _, first, rows, counts = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    return np.argsort(order)[rows], counts[order], first[order]


def alike_order(kinds: np.ndarray, costs: np.ndarray) -> list[np.ndarray]:
    """Sorting keys, the most important first, by which neighbours are alike in kind [P] and in every cost [P, m].

    All costs but the last are cut into bands, as many of each as leaves every cost about equally fine; the last
    rises in one band and falls in the next, so that neighbours across a border are alike in it too.
    """
    bands = round(len(costs) ** (1 / costs.shape[1]))
    band = costs[:, :-1].argsort(axis=0, kind="stable").argsort(axis=0) * bands // len(costs)
    return [kinds, *band.T, np.where(band.sum(axis=1) % 2, -costs[:, -1], costs[:, -1])]


def split_preferences(
    strata: Sequence[str] | np.ndarray,
    splits: SplitSizes | Slice,
    held_out: float,
    seed: int,
    units: Sequence[str] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the prompts whose labels the scorers learn from, evenly over the strata, unit by unit.

    Args:
        strata: a stratum for each prompt (its kind, where known), shape [prompts]; a unit is of its first prompt's.
        splits: shares; `splits.preferences` of all prompts are chosen, as nearly as whole units allow.
        held_out: share of the chosen ones that is kept from the scorers' fit.
        seed: the experiment's seed.
        units: the prompts' units, shape [prompts]; each prompt one of its own by default.

    Returns:
        (is a preferences prompt, is a held-out one), both bool [prompts]; the second implies the first.
    """
    sizes = split_sizes(len(strata), splits, held_out)
    parts = {FITTED: sizes[FITTED], HELD_OUT: sizes[HELD_OUT]}
    parts["pool"] = len(strata) - sum(parts.values())
    generator = numpy_stream(seed, "preferences")
    rows, counts, first = _unit_rows(np.arange(len(strata)) if units is None else np.asarray(units))
    order = [np.asarray(strata)[first], generator.random(len(first))]
    names = deal(order, counts, parts, generator)[rows]
    return names != "pool", names == HELD_OUT


def deal(
    order: Sequence[np.ndarray], counts: np.ndarray, sizes: Mapping[str, int], generator: np.random.Generator
) -> np.ndarray:
    """Deal whole units to parts whose sizes in prompts come as near to those asked for as the units allow.

    The largest units go first, those of one size evenly over the sorted list (`spread`), each part getting of them in
    proportion to what it still lacks; a fraction is decided by chance, so that no part is preferred by large units.
    Units of one prompt fill up the rest. Where all are, it is `spread`.

    Args:
        order: sorting keys, the most important first, each [U].
        counts: [U] prompts of each unit.
        sizes: prompts of each part; they add up to the sum of counts.
        generator: the random stream.

    Returns:
        The part of each unit, str objects, shape [U].
    """
    parts = np.empty(len(counts), dtype=object)
    lacking = np.array(list(sizes.values()), dtype=float)
    for count in np.unique(counts)[::-1]:
        here = np.flatnonzero(counts == count)
        shares = np.maximum(lacking, 0)
        exact = len(here) * shares / shares.sum()
        dealt = np.rint(exact)
        if not np.allclose(exact, dealt):
            edges = np.floor(np.cumsum(exact)[:-1] + generator.random())
            dealt = np.diff([0, *edges, len(here)])
        sized = dict(zip(sizes, map(int, dealt), strict=True))
        parts[here] = spread([key[here] for key in order], sized, generator)
        lacking -= count * dealt
    return parts


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

    Args:
        sizes: units of each part, which are its prompts where no two are near duplicates.
        prompts: in all.

    Raises:
        InputError: with what each part gets and needs.
    """
    small = [name for name, size in sizes.items() if size < FEWEST[name]]
    if small:
        given = "; ".join(f"{name} {size} (needs {FEWEST[name]})" for name, size in sizes.items())
        raise InputError(
            f"too few prompts to split: {prompts} prompts leave {', '.join(small)} too small",
            where=f"data.splits: {given}",
            fix="give data with more prompts (near duplicates and a `group` count as one), or shift the shares in "
            "data.splits or data.held_out",
        )

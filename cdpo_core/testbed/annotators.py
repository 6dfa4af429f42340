"""The testbed's data set: prompts, demonstrations, and preference pairs with noisy labels.

Annotators prefer by Bradley–Terry in true units times a sharpness and flag a response as unsafe with
probability σ(sharpness · c), so the scorers' losses are well specified; all label noise is that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cdpo_core.errors import InputError
from cdpo_core.randomness import numpy_stream
from cdpo_core.tables import write_table
from cdpo_core.testbed import grammar
from cdpo_core.testbed.calibration import calibrate
from cdpo_core.testbed.world import KIND_SHARES, KINDS, World, draw, draw_pairs

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime, Slice

# Candidates among which the next preference prompt is the one whose parts were seen least.
CANDIDATES = 64
CHUNK = 512
# Share of the labelled responses that are broken: raters of real models see such text too, and scorers that never
# did would praise what a policy writes by mistake.
SLIPS = 0.02


def make_world(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the testbed's `data` artifact, with world.json beside the tables.

    Reads testbed.{seed, costs, prompts, pairs_per_prompt, demonstrations, sharpness, calibrated_limit},
    testbed.calibrated_beta, data.splits and data.held_out.

    Raises:
        InputError: more prompts asked for than leave some to demonstrate on.
    """
    testbed = config.testbed
    prompts = draw_prompts(testbed.seed, testbed.prompts, config.data.splits.preferences, config.data.held_out)
    pool = prompts[prompts["split"] == "pool"]
    runtime.progress("calibrating the world", 0, 3)
    world = calibrate(
        testbed.seed,
        beta=config.testbed.calibrated_beta,
        limit=testbed.calibrated_limit,
        sharpness=testbed.sharpness,
        pool=part_indices(pool),
        costs=testbed.costs,
    )
    runtime.progress("asking annotators", 1, 3)
    pairs = label_pairs(world, prompts, testbed.pairs_per_prompt, testbed.sharpness)
    runtime.progress("asking demonstrators", 2, 3)
    demonstrations = demonstrate(world, prompts, testbed.demonstrations)
    world.save(out / "world.json")
    write_table(prompts, out / "prompts.parquet")
    write_table(pairs, out / "preferences.parquet")
    write_table(demonstrations, out / "demonstrations.parquet")
    _write_json(out / "quarantine.json", {"rows": len(pairs), "kept": len(pairs), "quarantined": {}, "examples": []})
    _write_json(out / "summary.json", _summary(world, prompts, pairs, demonstrations, testbed.sharpness))
    runtime.progress("data", 3, 3)


def draw_prompts(seed: int, count: int, preferences: float, held_out: float) -> pd.DataFrame:
    """The world's prompts: split preferences or pool, each with the kinds in their fixed shares.

    Each is a unit of its own (`data.near_duplicates`): they are distinct draws from all prompts by construction.

    Args:
        seed: the world's.
        count: prompts in all.
        preferences: share of them whose responses are labelled. They are chosen so that every part
            occurs among them about equally often.
        held_out: share of those kept from the scorers' training.

    Raises:
        InputError: count leaves too few of the possible prompts for demonstrations.
    """
    everything = grammar.all_prompts()
    most = len(everything) * 3 // 4
    if count > most:
        raise InputError(
            f"{count} prompts are more than the testbed can give",
            where="testbed.prompts",
            fix=f"ask for at most {most}",
        )
    world = World(seed)
    random = numpy_stream(seed, "world", "prompts")
    by_kind = {kind: everything[world.kinds(everything) == kind] for kind in KINDS}
    labelled = round(count * preferences)
    chosen = _balanced(by_kind, _counts(labelled), random)
    taken = {tuple(parts) for parts in chosen.tolist()}
    rest = []
    for kind, number in zip(KINDS, _counts(count - labelled), strict=True):
        free = np.array([parts for parts in by_kind[kind].tolist() if tuple(parts) not in taken])
        rest.append(free[random.permutation(len(free))[:number]])
    table = _prompt_table(world, np.concatenate([chosen, *rest]), labelled)
    table.insert(list(table.columns).index("split") + 1, "held_out", _hold_out(table, held_out, random))
    order = np.concatenate([random.permutation(labelled), labelled + random.permutation(count - labelled)])
    return table.iloc[order].reset_index(drop=True)


def label_pairs(world: World, prompts: pd.DataFrame, pairs_per_prompt: int, sharpness: float) -> pd.DataFrame:
    """Pairs of different demonstrators' responses to the preference prompts, labelled by annotators.

    A share SLIPS of the responses is broken (see `_broken`), of the least reward and the worst costs of its prompt.
    """
    labelled = prompts[prompts["split"] == "preferences"]
    random = numpy_stream(world.seed, "world", "labels")
    slips = numpy_stream(world.seed, "world", "slips")
    responses = np.array(world.responses, dtype=object)
    tables = []
    for start in range(0, len(labelled), CHUNK):
        chunk = labelled.iloc[start : start + CHUNK]
        parts = part_indices(chunk)
        pairs = draw_pairs(world.demonstrator_log_probs(parts), pairs_per_prompt, random)
        reward, costs = world.scores(parts)
        slipped = slips.random(pairs.shape) < SLIPS
        rows = np.arange(len(parts))[:, None, None]
        rewards = np.where(slipped, reward.min(1)[rows], reward[rows, pairs]).reshape(-1, 2)
        harms = np.where(slipped[..., None], costs.max(1)[rows], costs[rows, pairs]).reshape(-1, 2, len(world.labels))
        chosen = responses[pairs]
        chosen[slipped] = [_broken(text, slips) for text in chosen[slipped]]
        chosen = chosen.reshape(-1, 2)
        names = chunk["prompt_id"].repeat(pairs_per_prompt).to_numpy()
        columns: dict[str, Any] = {
            "pair_id": [f"{name}-{i % pairs_per_prompt:03d}" for i, name in enumerate(names)],
            "prompt_id": names,
            "response_0": chosen[:, 0],
            "response_1": chosen[:, 1],
            "better": _answer(sharpness * (rewards[:, 1] - rewards[:, 0]), random),
        }
        for index, label in enumerate(world.labels):
            harm = harms[:, :, index]
            columns[f"safer_{label}"] = _answer(sharpness * (harm[:, 0] - harm[:, 1]), random)
            columns[f"unsafe_{label}_0"] = _answer(sharpness * harm[:, 0], random)
            columns[f"unsafe_{label}_1"] = _answer(sharpness * harm[:, 1], random)
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _broken(text: str, random: np.random.Generator) -> str:
    """The text as a model breaks it now and then: a word lost, a word repeated, or begun twice."""
    words = text.split()
    place = int(random.integers(len(words)))
    # Two words at most, since every batch is as long as its longest text.
    begun = words[: min(place + 1, 2)]
    slips = (words[:place] + words[place + 1 :], words[: place + 1] + words[place:], begun + words)
    return " ".join(slips[random.integers(len(slips))])


def demonstrate(world: World, prompts: pd.DataFrame, count: int) -> pd.DataFrame:
    """Demonstrations on prompts outside the pool, so that the pool's prompts are new to the reference.

    All possible prompts but the pool's are gone through in random order, as often as `count` needs.
    """
    random = numpy_stream(world.seed, "world", "demonstrations")
    pool = set(prompts.loc[prompts["split"] == "pool", "prompt_id"])
    free = np.array([parts for parts in grammar.all_prompts() if grammar.prompt_id(parts) not in pool])
    turns = [random.permutation(len(free)) for _ in range(-(-count // len(free)))]
    parts = free[np.concatenate(turns)[:count]]
    responses = np.array(world.responses, dtype=object)
    chosen = []
    for start in range(0, count, CHUNK):
        log_probs = world.demonstrator_log_probs(parts[start : start + CHUNK])
        chosen.append(draw(log_probs, 1, random)[:, 0])
    return pd.DataFrame(
        {
            "prompt_id": [grammar.prompt_id(row) for row in parts],
            "prompt": [grammar.prompt_text(row) for row in parts],
            "response": responses[np.concatenate(chosen)],
        }
    )


def part_indices(prompts: pd.DataFrame) -> NDArray[np.int64]:
    """[P, 3]: the prompts' parts."""
    return prompts[list(grammar.PARTS)].to_numpy(dtype=np.int64)


def _balanced(
    by_kind: Mapping[str, NDArray[np.int64]], counts: list[int], random: np.random.Generator
) -> NDArray[np.int64]:
    """Prompts of each kind in the given numbers, no part rare among them."""
    seen = [np.zeros(len(part)) for part in grammar.PARTS.values()]
    kinds = random.permutation(np.repeat(np.array(KINDS), counts))
    free = dict(by_kind)
    chosen = []
    for kind in kinds.tolist():
        places = random.integers(len(free[kind]), size=CANDIDATES)
        candidates = free[kind][places]
        # Cubed, so that one part seen rarely outweighs three seen somewhat rarely.
        need = sum(1 / (1 + count[candidates[:, index]]) ** 3 for index, count in enumerate(seen))
        best = int(np.argmax(need))
        free[kind] = np.delete(free[kind], places[best], axis=0)
        chosen.append(candidates[best])
        for index, count in enumerate(seen):
            count[candidates[best, index]] += 1
    return np.array(chosen, dtype=np.int64).reshape(-1, len(seen))


def _prompt_table(world: World, parts: NDArray[np.int64], labelled: int) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "prompt_id": [grammar.prompt_id(row) for row in parts],
            "prompt": [grammar.prompt_text(row) for row in parts],
            "kind": world.kinds(parts).astype(object),
            "unit": [grammar.prompt_id(row) for row in parts],
            "split": ["preferences"] * labelled + ["pool"] * (len(parts) - labelled),
        }
    )
    for index, name in enumerate(grammar.PARTS):
        table[name] = parts[:, index]
    return table


def _hold_out(table: pd.DataFrame, share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """The share of each kind's preference prompts, at random."""
    held = np.zeros(len(table), dtype=bool)
    for kind in KINDS:
        rows = np.flatnonzero((table["split"] == "preferences") & (table["kind"] == kind))
        held[random.permutation(rows)[: round(share * len(rows))]] = True
    return held


def _counts(total: int) -> list[int]:
    """How many prompts of each kind: the shares, rounded to the total by the largest remainders."""
    exact = np.array(KIND_SHARES) * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return [int(number) for number in counts]


def _answer(log_odds: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.int8]:
    return (random.random(len(log_odds)) < 1 / (1 + np.exp(-log_odds))).astype(np.int8)


def _summary(
    world: World, prompts: pd.DataFrame, pairs: pd.DataFrame, demonstrations: pd.DataFrame, sharpness: float
) -> dict[str, Any]:
    return {
        "sharpness": sharpness,
        "labels": list(world.labels),
        "prompts": len(prompts),
        "pairs": len(pairs),
        "demonstrations": len(demonstrations),
        "kinds": {kind: int((prompts["kind"] == kind).sum()) for kind in KINDS},
    }


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")

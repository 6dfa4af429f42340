"""Where the named limits of a world lie: tight, middle and loose, between what help alone costs and the floor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdpo_core.testbed.judgement import PLACEMENTS
from cdpo_core.testbed.world import World, log_normalised

DECIMALS = 3
CHUNK = 256


def placed_limits(world: World, prompt_ids: Sequence[str], beta: float) -> dict[str, list[float]]:
    """Limits [m] by name, a share of the way from E_{π_0}[c] down to E_x min_y c, exact over all responses.

    The demonstrators stand for the reference, as in the world's calibration, so that the limits are a property of
    the world and not of a training.

    Args:
        world: the world.
        prompt_ids: the prompts that policies are trained and measured on.
        beta: units of reward per nat.
    """
    names = list(prompt_ids)
    at_zero = np.zeros(len(world.labels))
    floor = np.zeros(len(world.labels))
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        reward, costs = world.true_scores(chunk)
        best = np.exp(log_normalised(world.demonstrator_log_probs_of(chunk) + reward / beta))
        at_zero += np.einsum("pr,prm->m", best, costs) / len(names)
        floor += costs.min(1).sum(0) / len(names)
    return {
        name: [round(float(value), DECIMALS) for value in at_zero + share * (floor - at_zero)]
        for name, share in PLACEMENTS.items()
    }

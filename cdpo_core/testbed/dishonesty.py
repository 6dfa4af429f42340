"""The testbed's second cost: how far a response claims more than is true.

What raters take for help is partly show: confident, round and quick answers please and mislead. Words mislead on
every prompt alike but for the topics; prompts differ in how much their answers tempt to it. All of it is drawn from
streams of its own, so a world has the same reward and harm with one cost as with two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed import grammar

Array = NDArray[np.float64]

# How far each word misleads.
UNTRUE = {
    "Simply": 0.5, "Always": 0.9, "Perhaps": -0.7, "Never": 0.1,
    "measure": -0.2, "check": -0.4, "loosen": 0.4, "heat": 0.2, "cut": 0.0, "bypass": 0.7,
    "label": 0.7, "rinse": -0.3, "seal": 0.4, "mix": -0.2, "hide": 0.3, "flood": 0.6,
    "slowly": 0.0, "openly": -0.7, "quickly": 0.6, "quietly": 0.3,
    "alone": 0.0, "together": 0.7, "supervised": -0.4,
}  # fmt: skip
# Share of the prompts' temptation to it that is their risk of harm.
RISK_SHARE = 0.5


@dataclass(frozen=True)
class DishonestyConstants:
    """What makes the second cost equally difficult in every world; found by `calibration.calibrate`.

    Attributes:
        kinship: how much of a word's harm counts as dishonesty too.
        persuasion: how much of a word's help is mere show.
        mean: demonstrators' mean of the words' sums, before saturation.
        scale: their deviation within prompts, before saturation.
        cost_scale: units of cost within a prompt.
        level_scale: how far prompts lie apart in cost.
        level_center: the temptation at which a prompt is neither safe nor unsafe.
        cost_shift: puts the calibrated limit half way to the floor.
    """

    kinship: float = 0.0
    persuasion: float = 0.0
    mean: float = 0.0
    scale: float = 1.0
    cost_scale: float = 1.0
    level_scale: float = 0.0
    level_center: float = 0.0
    cost_shift: float = 0.0


def word_table(seed: int, topics: int) -> Array:
    """[2 + topics, words]: how far each word misleads, by feature of the prompt (constant, gate, topics)."""
    random = numpy_stream(seed, "world", "dishonesty")
    meaning = np.array([UNTRUE[word] for word in grammar.WORDS])
    words = meaning + 0.15 * random.standard_normal(len(meaning))
    return np.vstack([words, np.zeros(len(words)), 0.1 * random.standard_normal((topics, len(words)))])


def temptation(seed: int, parts: NDArray[np.int64]) -> Array:
    """[P]: the prompts' own leaning to dishonest answers, of deviation about 1."""
    random = numpy_stream(seed, "world", "temptation")
    tables = [random.standard_normal(len(part)) for part in grammar.PARTS.values()]
    return np.sum([table[parts[:, index]] for index, table in enumerate(tables)], axis=0) / np.sqrt(len(tables))

"""The truth of the testbed: reward and cost of every text, as functions of prompt parts and words.

A prompt has a risk, the sum of its parts' leanings, and two topics. A gate rises from 0 on benign to
1 on harmful prompts and decides how much harm a word does there and whether raters mind it. All
tables are linear in the prompt's features (1, gate, topic, topic) and in the words of the response;
the costs are saturated, so that a safe response cannot become ever safer. A world has one cost, harm,
or two (dishonesty.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed import grammar
from cdpo_core.testbed.dishonesty import RISK_SHARE, DishonestyConstants, temptation, word_table

Array = NDArray[np.float64]

KINDS = ("benign", "borderline", "harmful")
KIND_SHARES = (0.44, 0.14, 0.42)
LABELS = ("harm", "dishonesty")

TOPICS = 2
GATE_SLOPE = 3.0
LEVEL_SLOPE = 1.5
# Cost: share of a word's harm that counts on benign prompts too, and how soon the sum saturates.
HARM_ANYWHERE = 0.6
SATURATION = 1.1
# Reward, at the two ends of the gate: raters mind harm a little on harmful prompts and are after the
# shortcuts there; how much they mind it on benign ones is calibrated.
CARE_HARMFUL = 0.3
SHORTCUT_BONUS = 3.5
# Demonstrators: log-odds of each word stay within this, so that none is too rare to be learned.
DEMONSTRATOR_LIMIT = 1.5
SHORTCUT_RELUCTANCE = 1.4


@dataclass(frozen=True)
class Constants:
    """What makes every world equally difficult; found by `calibration.calibrate`.

    Attributes:
        care: how much raters mind harm on benign prompts.
        reward_scale: units of reward.
        reward_shift: makes the demonstrators' mean reward 0.
        harm_mean: demonstrators' mean of the words' harm, before saturation.
        harm_scale: its deviation within prompts, before saturation.
        cost_scale: units of cost within a prompt.
        level_scale: how far prompts lie apart in cost.
        level_center: the risk at which a prompt is neither safe nor unsafe.
        cost_shift: puts the calibrated limit half way to the floor.
    """

    care: float = 1.5
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    harm_mean: float = 0.0
    harm_scale: float = 1.0
    cost_scale: float = 1.0
    level_scale: float = 3.5
    level_center: float = 0.0
    cost_shift: float = 0.0


@dataclass(frozen=True)
class World:
    """One world: everything about it follows from its seed and its constants.

    Attributes:
        seed: draws what words and parts mean in this world.
        constants: its calibration.
        dishonesty: the second cost's; None for a world with one cost.
    """

    seed: int
    constants: Constants = field(default_factory=Constants)
    dishonesty: DishonestyConstants | None = None

    @classmethod
    def load(cls, path: Path) -> World:
        """Rebuild a world from its world.json."""
        record = json.loads(path.read_text())
        second = record.get("dishonesty")
        return cls(record["seed"], Constants(**record["constants"]), DishonestyConstants(**second) if second else None)

    def save(self, path: Path) -> None:
        """Write world.json: all that `load` needs."""
        record = {"seed": self.seed, "labels": list(self.labels), "constants": asdict(self.constants)}
        if self.dishonesty is not None:
            record["dishonesty"] = asdict(self.dishonesty)
        path.write_text(json.dumps(record, indent=1) + "\n")

    @property
    def labels(self) -> tuple[str, ...]:
        """The costs' names, m of them."""
        return LABELS[:1] if self.dishonesty is None else LABELS

    @property
    def responses(self) -> tuple[str, ...]:
        """All R responses of the grammar."""
        return grammar.responses()

    def kinds(self, parts: NDArray[np.int64]) -> NDArray[np.str_]:
        """[P]: benign, borderline or harmful, by the prompt's risk."""
        return np.array(KINDS)[np.digitize(self.risk(parts), self._kind_borders)]

    def risk(self, parts: NDArray[np.int64]) -> Array:
        """[P]: standardised over all possible prompts."""
        return (self._raw_risk(parts) - self._risk_units[0]) / self._risk_units[1]

    def demonstrator_log_probs(self, parts: NDArray[np.int64]) -> Array:
        """[P, R]: log-probabilities of the demonstrators' responses."""
        words = np.clip(self._features(parts) @ self._tables["demonstrator"], -DEMONSTRATOR_LIMIT, DEMONSTRATOR_LIMIT)
        return log_normalised(spread(words) + self._tables["demonstrator_pairs"])

    def demonstrator_log_probs_of(self, prompt_ids: Iterable[str]) -> Array:
        """[P, R]: the same for prompts by their identifiers."""
        return self.demonstrator_log_probs(grammar.prompt_parts(prompt_ids))

    def scores(self, parts: NDArray[np.int64]) -> tuple[Array, Array]:
        """True reward [P, R] and costs [P, R, m] of every response to prompts of the given parts."""
        unscaled, minded = self.reward_terms(parts)
        constants = self.constants
        reward = constants.reward_scale * (unscaled - constants.care * minded) - constants.reward_shift
        sums = (self.harm_sums(parts) - constants.harm_mean) / constants.harm_scale
        within = saturated(sums, constants.cost_scale)
        costs = [level(self.risk(parts), constants)[:, None] + within + constants.cost_shift]
        if self.dishonesty is not None:
            second = self.dishonesty
            within = saturated((self.dishonesty_sums(parts) - second.mean) / second.scale, second.cost_scale)
            costs.append(level(self.temptation(parts), second)[:, None] + within + second.cost_shift)
        return reward, np.stack(costs, axis=-1)

    def true_scores(self, prompt_ids: Iterable[str]) -> tuple[Array, Array]:
        """True reward [P, R] and costs [P, R, m] of every response to every prompt, in their units."""
        return self.scores(grammar.prompt_parts(prompt_ids))

    def score_texts(self, prompt_ids: Sequence[str], responses: Sequence[str]) -> tuple[Array, Array]:
        """True reward [N] and costs [N, m] of any texts.

        A text that is not of the grammar earns the prompt's least reward and its worst costs.
        """
        names, rows = np.unique(np.asarray(prompt_ids, dtype=object).astype(str), return_inverse=True)
        columns = np.array([grammar.parse(text) for text in responses], dtype=np.int64)
        reward, costs = np.empty(len(columns)), np.empty((len(columns), len(self.labels)))
        for start in range(0, len(names), 256):
            here = np.flatnonzero((rows >= start) & (rows < start + 256))
            all_rewards, all_costs = self.true_scores(names[start : start + 256])
            row, column, known = rows[here] - start, columns[here], columns[here] >= 0
            reward[here] = np.where(known, all_rewards[row, column], all_rewards.min(1)[row])
            costs[here] = np.where(known[:, None], all_costs[row, column], all_costs.max(1)[row])
        return reward, costs

    def reward_terms(self, parts: NDArray[np.int64]) -> tuple[Array, Array]:
        """The reward's two terms [P, R]: reward = scale * (first - care * second) - shift."""
        features = self._features(parts)
        help_ = spread(features @ self._tables["reward"]) + self._tables["reward_pairs"]
        return help_, spread((1 - features[:, 1:2]) * self._tables["harm"])

    def harm_sums(self, parts: NDArray[np.int64]) -> Array:
        """[P, R]: the harm of the words in the prompt's light, before units and saturation."""
        return spread(self._features(parts) @ self._tables["cost"])

    def dishonesty_sums(self, parts: NDArray[np.int64]) -> Array:
        """[P, R]: how far the words mislead, before units and saturation."""
        constants = self.dishonesty or DishonestyConstants()
        table = word_table(self.seed, TOPICS) + constants.kinship * self._tables["cost"]
        table[0] += constants.persuasion * self._tables["reward"][0]
        return spread(self._features(parts) @ table)

    def temptation(self, parts: NDArray[np.int64]) -> Array:
        """[P]: how much prompts tempt to dishonest answers, risky ones more."""
        share = np.sqrt(1 - RISK_SHARE**2)
        return RISK_SHARE * self.risk(parts) + share * temptation(self.seed, parts)

    def _features(self, parts: NDArray[np.int64]) -> Array:
        """[P, 4]: constant, gate, topics."""
        gate = 1 / (1 + np.exp(-GATE_SLOPE * (self.risk(parts) - self._kind_borders.mean())))
        topics = np.tanh(sum(table[parts[:, index]] for index, table in enumerate(self._topics)))
        return np.column_stack([np.ones(len(parts)), gate, topics])

    def _raw_risk(self, parts: NDArray[np.int64]) -> Array:
        return np.sum([table[parts[:, index]] for index, table in enumerate(self._leanings)], axis=0)

    @cached_property
    def _leanings(self) -> list[Array]:
        random = numpy_stream(self.seed, "world", "risk")
        return [
            np.array(list(part.values())) + 0.25 * random.standard_normal(len(part)) for part in grammar.PARTS.values()
        ]

    @cached_property
    def _topics(self) -> list[Array]:
        random = numpy_stream(self.seed, "world", "topics")
        return [0.6 * random.standard_normal((len(part), TOPICS)) for part in grammar.PARTS.values()]

    @cached_property
    def _risk_units(self) -> tuple[float, float]:
        risk = self._raw_risk(grammar.all_prompts())
        return float(risk.mean()), float(risk.std())

    @cached_property
    def _kind_borders(self) -> Array:
        return np.quantile(self.risk(grammar.all_prompts()), np.cumsum(KIND_SHARES)[:2])

    @cached_property
    def _tables(self) -> dict[str, Array]:
        """Per-word tables [4 features, words] and per-response pair terms [R]."""
        random = numpy_stream(self.seed, "world", "words")
        meaning = np.array([figures for words in grammar.SLOTS.values() for figures in words.values()])
        help_, harm = (meaning + 0.15 * random.standard_normal(meaning.shape)).T
        shortcut = np.isin(grammar.WORDS, grammar.SHORTCUTS).astype(float)
        first, second = grammar.COUPLED
        fits = 0.3 * random.standard_normal((2, grammar.SIZES[first], grammar.SIZES[second]))
        pairs = fits[:, grammar.slot_values()[:, first], grammar.slot_values()[:, second]]
        topics = random.standard_normal((3, TOPICS, len(help_)))
        habit = 0.3 * random.standard_normal(len(help_)) - SHORTCUT_RELUCTANCE * shortcut
        return {
            "harm": harm,
            "reward": np.vstack([help_, SHORTCUT_BONUS * shortcut - CARE_HARMFUL * harm, 0.2 * topics[0]]),
            "cost": np.vstack([HARM_ANYWHERE * harm, (1 - HARM_ANYWHERE) * harm, 0.1 * topics[1]]),
            "demonstrator": np.vstack(
                [habit + 0.3 * np.minimum(help_, 0.5), -0.5 * np.minimum(harm, 0.6), 0.4 * topics[2]]
            ),
            "reward_pairs": pairs[0],
            "demonstrator_pairs": pairs[1],
        }


def saturated(sums: Array, scale: float) -> Array:
    """A cost within a prompt: the words' sums, in units of their deviation, flat where they are large."""
    return scale * np.tanh(SATURATION * sums) / SATURATION


def level(risk: Array, constants: Constants | DishonestyConstants) -> Array:
    """[P]: how far the cost of every response to a prompt of that risk lies up or down."""
    return constants.level_scale * np.tanh(LEVEL_SLOPE * (risk - constants.level_center))


def spread(words: Array) -> Array:
    """[P, R]: sums of per-word figures [P, words] over each response's words."""
    total = np.zeros((len(words), 1))
    for slot in np.split(words, np.cumsum(grammar.SIZES)[:-1], axis=1):
        total = (total[:, :, None] + slot[:, None, :]).reshape(len(words), -1)
    return total


def log_normalised(scores: Array) -> Array:
    """Log-probabilities proportional to exp(scores), over the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def draw(log_probs: Array, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """[P, count]: responses drawn from the distributions [P, R]."""
    cumulated = np.exp(log_probs).cumsum(1)
    uniform = random.random((len(log_probs), count)) * cumulated[:, -1:]
    rows = [np.searchsorted(row, points, side="right") for row, points in zip(cumulated, uniform, strict=True)]
    return np.minimum(np.array(rows, dtype=np.int64).reshape(uniform.shape), log_probs.shape[1] - 1)


def draw_pairs(log_probs: Array, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """[P, count, 2]: pairs of two different responses, the second drawn anew until it differs."""
    first, second = draw(log_probs, count, random), draw(log_probs, count, random)
    while (same := first == second).any():
        rows = np.flatnonzero(same.any(1))
        second[rows] = np.where(same[rows], draw(log_probs[rows], count, random), second[rows])
    return np.stack([first, second], axis=-1)

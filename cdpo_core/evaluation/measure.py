"""A policy's scored responses to the prompts of one split, and what they say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.evaluation import metrics, tails
from cdpo_core.evaluation.metrics import Estimate


@dataclass(frozen=True)
class Measured:
    """Scored responses, one row each.

    Attributes:
        table: prompt_id, sample, response, finished, log_prob, ref_log_prob, unit, reward, cost_<name>; in (prompt,
            sample) order. A unit is what every interval and test counts as one observation: a prompt with its near
            duplicates (`data.near_duplicates`), which have equally many responses; without the column each prompt
            is one.
        sources: the responses' and the scores' artifacts, where they come from a store.
    """

    table: pd.DataFrame
    sources: tuple[ArtifactRef, ...] = ()

    @property
    def _prompts(self) -> np.ndarray:
        return self.table["prompt_id"].to_numpy()

    @property
    def _units(self) -> np.ndarray:
        return self.table["unit" if "unit" in self.table else "prompt_id"].to_numpy()

    def counts(self) -> tuple[int, int]:
        """(prompts, units)."""
        return len(set(self._prompts)), len(set(self._units))

    def units(self) -> dict[str, str]:
        """The unit of each prompt."""
        return dict(zip(self._prompts, self._units, strict=True))

    def prompts(self) -> list[str]:
        """The prompts' ids, sorted: the order of `prompt_costs`."""
        return sorted(self.table["prompt_id"].unique())

    def reward(self) -> Estimate:
        """Mean reward with its 95 % interval, units being the observations."""
        return metrics.cluster_mean(self.table["reward"].to_numpy(float), self._units)

    def cost(self, name: str) -> Estimate:
        """Mean cost (calibrated units) with its 95 % interval."""
        return metrics.cluster_mean(self.table[f"cost_{name}"].to_numpy(float), self._units)

    def kl(self) -> Estimate:
        """KL(π‖π_ref) in nats, over π's own samples."""
        log_prob, ref_log_prob = (self.table[name].to_numpy(float) for name in ("log_prob", "ref_log_prob"))
        return metrics.kl_divergence(log_prob, ref_log_prob, self._units)

    def safe_rate(self, names: Sequence[str]) -> Estimate:
        """Share of responses of which every cost is at most 0, the border of safe."""
        return metrics.safe_rate(self.costs(names), self._units)

    def unfinished(self) -> Estimate | None:
        """Share of responses that were cut at the longest length instead of ending; None where it was not recorded."""
        if "finished" not in self.table:
            return None
        return metrics.cluster_share(~self.table["finished"].to_numpy(bool), self._units)

    def spread(self, name: str) -> float | None:
        """Deviation of a cost among the different responses to the same prompt; None where no prompt has two.

        Equal responses have equal costs, whatever the model: only different ones ask it anything.
        """
        rows = self.table.drop_duplicates(["prompt_id", "response"])
        rows = rows[rows.groupby("prompt_id")["response"].transform("size") > 1]
        if rows.empty:
            return None
        costs = rows[f"cost_{name}"]
        deviations = (costs - costs.groupby(rows["prompt_id"]).transform("mean")).to_numpy(float)
        return float(np.sqrt((deviations**2).mean()))

    def win_rate(self, other: Measured) -> Estimate:
        """Probability that a response earns more reward than another policy's to the same prompt; ties count half."""
        mine, theirs = self.table["reward"].to_numpy(float), other.table["reward"].to_numpy(float)
        return metrics.win_rate(mine, self._prompts, theirs, other._prompts, self.units())

    def costs(self, names: Sequence[str]) -> np.ndarray:
        """[N, m] costs of the responses (calibrated units)."""
        return self.table[[f"cost_{name}" for name in names]].to_numpy(float)

    def prompt_costs(self, names: Sequence[str]) -> pd.DataFrame:
        """Each prompt's mean costs: index prompt_id (sorted), a column for each name."""
        columns = [f"cost_{name}" for name in names]
        means = self.table.groupby("prompt_id")[columns].mean().sort_index()
        return means.set_axis(list(names), axis=1)

    def unit_costs(self, names: Sequence[str]) -> pd.DataFrame:
        """Each unit's mean costs, over its prompts': index unit (sorted), a column for each name.

        These are the observations of a test; a unit is named by the id of one of its prompts, all of them in one split.
        """
        means = self.prompt_costs(names)
        units = self.units()
        return means.groupby([units[name] for name in means.index]).mean().rename_axis("unit").sort_index()

    def summary(
        self, names: Sequence[str], other: Measured | None = None, kinds: Mapping[str, str] | None = None
    ) -> dict[str, dict[str, float]]:
        """The report's figures: means, win rate over `other`, and beyond the mean (`tails`), each {mean, low, high}.

        Args:
            names: the constraints'; figures named `cost` alone are the first one's, `cost_<name>` the others'.
            other: the reference's responses to the same prompts.
            kinds: of the prompts, "" unknown; with them `cost/<kind>` and, on benign ones, `over_refusal`.
        """
        figures: dict[str, Estimate | None] = {
            "reward": self.reward(),
            "cost": self.cost(names[0]),
            "safe_rate": self.safe_rate(names),
            "kl": self.kl(),
            "unfinished": self.unfinished(),
        }
        if other is not None:
            figures["win_rate"] = self.win_rate(other)
        figures |= {f"cost_{name}": self.cost(name) for name in names[1:]}
        figures |= self._beyond_the_mean(names, other or self, kinds or {})
        return {
            name: {"mean": value.mean, "low": value.low, "high": value.high}
            for name, value in figures.items()
            if value is not None
        }

    def _beyond_the_mean(
        self, names: Sequence[str], reference: Measured, kinds: Mapping[str, str]
    ) -> dict[str, Estimate | None]:
        costs, prompts, units = self.costs(names), self._prompts, self._units
        means = reference.prompt_costs(names[:1])[names[0]]
        benign = tails.benign_prompts(kinds, dict(zip(map(str, means.index), map(float, means), strict=True)))
        return {
            "cvar": tails.cvar(costs[:, 0], units),
            "unsafe_prompts": tails.unsafe_prompts(costs[:, 0], prompts, units),
            "reward_where_safe": tails.reward_where_safe(self.table["reward"].to_numpy(float), costs, units),
            "over_refusal": tails.over_refusal(self.table["response"].tolist(), prompts, benign, units),
            **{f"cost/{kind}": value for kind, value in tails.cost_by_kind(costs[:, 0], prompts, kinds, units).items()},
        }


def join_scores(responses: pd.DataFrame, scores: pd.DataFrame, sources: tuple[ArtifactRef, ...] = ()) -> Measured:
    """Responses and their scores in one table, in (prompt, sample) order.

    Raises:
        ValueError: a response has no score or the other way round.
    """
    keys = ["prompt_id", "sample"]
    table = responses.merge(scores, on=keys, how="inner", validate="one_to_one")
    if len(table) != len(responses) or len(table) != len(scores):
        raise ValueError(f"{len(responses)} responses and {len(scores)} scores have {len(table)} in common")
    return Measured(table.sort_values(keys, ignore_index=True), sources)

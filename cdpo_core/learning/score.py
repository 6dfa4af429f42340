"""Rewards and costs of responses: by the scorers, or on the testbed by the truth itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cdpo_core.chunks import Chunks
from cdpo_core.errors import InputError
from cdpo_core.evaluation.cuts import write_cuts
from cdpo_core.models.scorer import load_scorer
from cdpo_core.tables import write_table

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime, Slice


def score_responses(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: one row of scores for each response; writes scores.parquet.

    Args:
        config: constraints (list of {name, labels}), oracle (whether the testbed's truth scores),
            trusted (the scorers whose own code may run; absent is none).
        inputs: data (prompts; world.json if oracle), responses, scorers_0, scorers_1, ... with
            together a head `reward` and one for each constraint.
        out: gets scores.parquet: prompt_id, sample, unit (of the prompt: what counts as one observation), reward,
            cost_<name> (float64, calibrated units), rows as in responses.parquet; and cut.json: for each
            scorer {texts, prompts_cut, responses_cut}.
        runtime: device, micro_batch (texts), scratch, progress.

    Raises:
        InputError: no scorer has a head of a needed name, or the world knows no such cost.
    """
    responses = pd.read_parquet(inputs["responses"] / "responses.parquet", columns=["prompt_id", "sample", "response"])
    names = [item["name"] for item in config.constraints]
    score = _truth if config.oracle else _learned
    values, cut = score(config, inputs, responses, runtime)
    units = pd.read_parquet(inputs["data"] / "prompts.parquet", columns=["prompt_id", "unit"]).set_index("prompt_id")
    unit = units["unit"].loc[responses["prompt_id"]].to_numpy()
    table = responses[["prompt_id", "sample"]].assign(unit=unit, reward=values["reward"])
    for name in names:
        table[f"cost_{name}"] = values[name]
    write_table(table, out / "scores.parquet")
    write_cuts(cut, out)


def _learned(
    config: Slice, inputs: Mapping[str, Path], responses: pd.DataFrame, runtime: Runtime
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet").set_index("prompt_id")["prompt"]
    texts = (prompts.loc[responses["prompt_id"]].tolist(), responses["response"].tolist())
    values: dict[str, np.ndarray] = {}
    cut: dict[str, Any] = {}

    def progress(done: int, total: int) -> None:
        runtime.progress("scores", done, total)

    for part in sorted(name for name in inputs if name.startswith("scorers_")):
        scorer = load_scorer(inputs[part], runtime.device, trust_remote_code=part in getattr(config, "trusted", ()))
        scores, counts = scorer.score_counted(*texts, runtime.micro_batch, progress, Chunks(runtime.scratch, part))
        values |= {name: scores[:, index].numpy() for index, name in enumerate(scorer.names)}
        cut[" and ".join(scorer.names)] = counts
    missing = {"reward", *(item["name"] for item in config.constraints)} - set(values)
    if missing:
        raise InputError(
            f"no scorer gives {min(missing)!r}",
            where=", ".join(sorted(values)) or "no scorers",
            fix="train or name one for each constraint",
        )
    return values, cut


def _truth(
    config: Slice, inputs: Mapping[str, Path], responses: pd.DataFrame, runtime: Runtime
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from cdpo_core.testbed.world import World

    world = World.load(inputs["data"] / "world.json")
    reward, costs = world.score_texts(responses["prompt_id"].tolist(), responses["response"].tolist())
    labels = [item["labels"] for item in config.constraints]
    unknown = [label for label in labels if label not in world.labels]
    if unknown:
        raise InputError(
            f"the testbed has no labels {unknown[0]!r}, but {', '.join(world.labels)}",
            where="constraints.labels",
            fix="name labels that the testbed has",
        )
    truth = {item["name"]: costs[:, world.labels.index(item["labels"])] for item in config.constraints}
    return {"reward": reward, **truth}, {}

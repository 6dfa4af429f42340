"""Reward and cost models: one backbone, one head for each, learned together from the annotators' labels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cdpo_core.chunks import Chunks
from cdpo_core.errors import InputError
from cdpo_core.learning.batches import Epochs, cut_into_passes, neighbours_order, scorer_pass_tokens
from cdpo_core.learning.calibration import calibration, scorer_report
from cdpo_core.learning.loop import Schedule, fit, mixed_precision
from cdpo_core.learning.losses import cost_loss
from cdpo_core.models.checkpoints import saved_dtype, write_json
from cdpo_core.models.ready_scorer import load_ready_scorer, new_scorer
from cdpo_core.models.scorer import Scorer, save_scorer
from cdpo_core.randomness import numpy_stream

if TYPE_CHECKING:
    from torch import Tensor

    from cdpo_core.models.scorer_text import EncodedText
    from cdpo_core.stages import Runtime, Slice


# Training pairs that a cost's range is told from, beside the held-out ones, and the share of the range added to it.
CEILING_PAIRS, CEILING_BEYOND = 2000, 0.1


@dataclass(frozen=True)
class LabelledPairs:
    """N response pairs and what the annotators said of them, for each of the scorer's heads.

    Attributes:
        prompt_ids: [N] str.
        units: [N] str, the prompts' units: what counts as one observation.
        prompts: N prompts.
        responses: N pairs of responses.
        higher: [N, heads] int8, which response the label says scores higher (for the reward the
            better one, for a cost the less safe one): 0, 1, or -1 unknown.
        unsafe: [N, heads, 2] int8 flags, 1 unsafe, 0 safe, -1 unknown or no cost.
    """

    prompt_ids: np.ndarray
    units: np.ndarray
    prompts: list[str]
    responses: list[tuple[str, str]]
    higher: np.ndarray
    unsafe: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, rows: np.ndarray) -> LabelledPairs:
        """The pairs in these rows [n] int."""
        return LabelledPairs(
            self.prompt_ids[rows],
            self.units[rows],
            [self.prompts[row] for row in rows],
            [self.responses[row] for row in rows],
            self.higher[rows],
            self.unsafe[rows],
        )

    def texts(self) -> tuple[list[str], list[str]]:
        """Prompts and responses of all 2N texts, pair by pair."""
        return [prompt for prompt in self.prompts for _ in range(2)], [text for pair in self.responses for text in pair]


def train_scorers(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: one scorer with a head for each of `heads`, trained and calibrated, or a ready one as it is.

    Args:
        config: seed, heads (list of {name, labels}; labels "" is "better", for the reward), base
            (`sft`, `scratch` or `loaded`), train, sign (`harmful`, or `safe` for a ready cost model
            whose larger scores are safer), trusted (code that comes with the model may run; absent is no),
            policy.{max_prompt_tokens, max_response_tokens, template_date}, reward.{epochs, batch, learning_rate,
            optimizer}.
        inputs: data (prompts, preferences, summary.json); base (model folder) when base is `loaded`, else
            sft (policy).
        out: gets the scorer's folder, training.json and report.json: for each head the accuracy on
            held-out prompts with its interval, its calibration, a warning if it may rank at random, and
            `same_tokens` of `all_pairs`: how many were set aside, because the scorer reads both responses as the
            same tokens.
        runtime: device, micro_batch (texts), scratch, progress.

    Raises:
        InputError: labels that the data does not have, no pair that the scorer can tell apart, or a ready model without
            a score head.
        TrainingError: the loss is not finite.
    """
    heads = config.heads
    held_out, train = load_pairs(inputs["data"], heads, required=config.train)
    sharpness = float(json.loads((inputs["data"] / "summary.json").read_text())["sharpness"])
    scorer = _starting_scorer(config, inputs).to(runtime.device)
    records: list[dict[str, Any]] = []
    parts = [tell_apart(scorer, pairs) for pairs in (held_out, train)]
    told = {"same_tokens": sum(part[2] for part in parts), "all_pairs": len(held_out) + len(train)}
    (held_out, _, _), (train, encoded, _) = parts
    if config.train:
        _check_some_are_left(train, told, config)
        dtype = saved_dtype(_base_folder(config, inputs))
        records = _fit(scorer, train, encoded, sharpness, config, dtype, runtime)
        scorer.backbone.to(dtype)
    kept = Chunks(runtime.scratch, "held-out")
    found = scorer.score(*held_out.texts(), runtime.micro_batch, chunks=kept)
    scores = found.view(len(held_out), 2, len(heads)).numpy()
    if config.train:
        scale, shift = calibration(scores, held_out.higher, held_out.unsafe, sharpness)
        scorer.scale.copy_(torch.from_numpy(scale))
        scorer.shift.copy_(torch.from_numpy(shift))
        scores = scores * scale + shift
        scorer.ceiling.copy_(torch.from_numpy(_ceilings(scorer, scores, train, config.heads, runtime)))
    report = {}
    for index, head in enumerate(heads):
        labels = (held_out.higher[:, index], held_out.unsafe[:, index], held_out.prompt_ids)
        end = float(scorer.ceiling[index])
        units = {
            "scale": float(scorer.scale[index]),
            "shift": float(scorer.shift[index]),
            "ceiling": end if math.isfinite(end) else None,
        }
        figures = scorer_report(scores[:, :, index], *labels, sharpness, held_out.units)
        report[head["name"]] = {**figures, **units, **told}
    save_scorer(scorer, out)
    write_json(out / "report.json", report)
    write_json(out / "training.json", {"steps": records})


def _ceilings(
    scorer: Scorer, held_out: np.ndarray, train: LabelledPairs, heads: Sequence[Mapping[str, str]], runtime: Runtime
) -> np.ndarray:
    """[heads] the end of each cost's range: a tenth of its range beyond the largest cost among labelled responses.

    Beyond it the labels say nothing; with it the cost is bounded, which a certificate that holds for every number of
    prompts rests on. Rewards have none.
    """
    chosen = train.at(np.arange(min(len(train), CEILING_PAIRS)))
    scores = scorer.score(*chosen.texts(), runtime.micro_batch).numpy()
    scores = np.concatenate([scores, held_out.reshape(-1, held_out.shape[-1])])
    ends = scores.max(0) + CEILING_BEYOND * np.ptp(scores, axis=0)
    return np.where([bool(head["labels"]) for head in heads], ends, np.inf)


def load_pairs(
    data: Path, heads: Sequence[Mapping[str, str]], *, required: bool
) -> tuple[LabelledPairs, LabelledPairs]:
    """The (held-out, training) pairs of a data artifact with the labels that the heads learn from.

    Args:
        data: the artifact (prompts, preferences).
        heads: {name, labels} of each head.
        required: whether labels that the data does not have are an error; else they are unknown.

    Raises:
        InputError: the data has no such labels.
    """
    table = pd.read_parquet(data / "preferences.parquet")
    prompts = pd.read_parquet(data / "prompts.parquet").set_index("prompt_id")
    higher = np.full((len(table), len(heads)), -1, dtype=np.int8)
    unsafe = np.full((len(table), len(heads), 2), -1, dtype=np.int8)
    for index, head in enumerate(heads):
        columns = _label_columns(head["labels"])
        missing = [column for column in columns if column not in table.columns]
        if missing and not required:
            continue
        if missing:
            raise InputError(
                f"the data has no labels {head['labels']!r} for {head['name']} (no column {missing[0]})",
                where="constraints.labels",
                fix="name labels that the data has, or use a ready model (train: false)",
            )
        order = table[columns[0]].to_numpy(np.int8)
        higher[:, index] = order
        if head["labels"]:
            # The label names the safer response; a cost is higher on the other one.
            higher[:, index] = np.where(order < 0, -1, 1 - order)
            unsafe[:, index] = table[columns[1:]].to_numpy(np.int8)
    is_held_out = prompts["held_out"].loc[table["prompt_id"]].to_numpy(bool)
    return tuple(  # type: ignore[return-value]
        LabelledPairs(
            prompt_ids=table["prompt_id"].to_numpy()[part],
            units=prompts["unit"].loc[table["prompt_id"]].to_numpy()[part],
            prompts=prompts["prompt"].loc[table["prompt_id"]].to_numpy()[part].tolist(),
            responses=list(zip(table["response_0"][part], table["response_1"][part], strict=True)),
            higher=higher[part],
            unsafe=unsafe[part],
        )
        for part in (is_held_out, ~is_held_out)
    )


def tell_apart(scorer: Scorer, pairs: LabelledPairs) -> tuple[LabelledPairs, list[EncodedText], int]:
    """The pairs whose responses the scorer reads as different tokens, encoded, and how many it does not.

    Cutting can leave two different responses the same beginning. Such a pair teaches nothing, and its label contradicts
    itself. Pairs of equal texts are none of these: they are the data's own.

    Returns:
        the pairs that are left, the tokens of their 2n texts, pair by pair, and the number that was set aside.
    """
    encoded = scorer.encode(*pairs.texts())

    def is_same(row: int) -> bool:
        first, second = pairs.responses[row]
        sides = encoded[2 * row : 2 * row + 2]
        return first != second and [list(part) for part in sides[0]] == [list(part) for part in sides[1]]

    rows = np.array([row for row in range(len(pairs)) if not is_same(row)], dtype=int)
    return pairs.at(rows), [encoded[2 * row + side] for row in rows for side in (0, 1)], len(pairs) - len(rows)


def _check_some_are_left(pairs: LabelledPairs, told: Mapping[str, int], config: Slice) -> None:
    if not len(pairs) and told["same_tokens"]:
        raise InputError(
            f"{told['same_tokens']} of {told['all_pairs']} pairs are two texts of the same tokens once they are cut "
            f"(prompts to {config.policy.max_prompt_tokens} tokens, responses to {config.policy.max_response_tokens}), "
            "and none is left to learn from",
            where="policy.max_response_tokens",
            fix="raise it until the responses of a pair differ within that length",
        )


def _label_columns(labels: str) -> list[str]:
    return [f"safer_{labels}", f"unsafe_{labels}_0", f"unsafe_{labels}_1"] if labels else ["better"]


def _base_folder(config: Slice, inputs: Mapping[str, Path]) -> Path:
    return inputs["base"] if config.base == "loaded" else inputs["sft"]


def _starting_scorer(config: Slice, inputs: Mapping[str, Path]) -> Scorer:
    names = [head["name"] for head in config.heads]
    folder = _base_folder(config, inputs)
    lengths = (config.policy.max_prompt_tokens, config.policy.max_response_tokens)
    trusted = bool(getattr(config, "trusted", False))
    day = config.policy.template_date
    if not config.train:
        flip = config.sign == "safe"
        return load_ready_scorer(folder, names, *lengths, flip=flip, trust_remote_code=trusted, template_date=day)
    seed = config.seed if config.base == "scratch" else None
    return new_scorer(folder, names, *lengths, scratch_seed=seed, trust_remote_code=trusted, template_date=day)


def _fit(
    scorer: Scorer,
    pairs: LabelledPairs,
    encoded: list[EncodedText],
    sharpness: float,
    config: Slice,
    dtype: torch.dtype,
    runtime: Runtime,
) -> list[dict[str, Any]]:
    """Joint maximum likelihood of all heads' labels; scores times sharpness are log-odds."""
    for index, head in enumerate(config.heads):
        if (pairs.higher[:, index] < 0).all() and (pairs.unsafe[:, index] < 0).all():
            raise InputError(
                f"no pair carries a label for {head['name']}",
                where=f"labels {head['labels'] or 'better'!r}",
                fix="give data with these labels, or use a ready model (train: false)",
            )
    device = scorer.heads.weight.device
    higher = torch.from_numpy(pairs.higher.astype(np.int64)).to(device)
    unsafe = torch.from_numpy(pairs.unsafe.astype(np.int64)).to(device)
    batch = min(config.reward.batch, len(pairs))
    prompts = np.unique(pairs.prompt_ids, return_inverse=True)[1]
    epochs = Epochs(
        lambda epoch: neighbours_order(prompts, numpy_stream(config.seed, "scorers", epoch)), len(pairs), batch
    )
    lengths = [_longest(encoded[2 * row : 2 * row + 2]) for row in range(len(pairs))]
    tokens = scorer_pass_tokens(scorer.backbone)

    def losses_at(step: int) -> Iterator[dict[str, Tensor]]:
        _, rows = epochs.at(step)
        for places in cut_into_passes([lengths[row] for row in rows], 2, tokens, runtime.micro_batch):
            chosen = rows[places]
            with mixed_precision(device, dtype):
                raw = scorer([encoded[2 * row + side] for row in chosen for side in (0, 1)])
            scores = sharpness * raw.view(len(chosen), 2, -1).transpose(1, 2)
            place = torch.from_numpy(chosen).to(device)
            by_head = cost_loss(scores, higher[place], unsafe[place]).sum(0) / len(rows)
            parts = {head["name"]: value.detach() for head, value in zip(config.heads, by_head, strict=True)}
            yield {"loss": by_head.sum(), **parts}

    steps = -(-config.reward.epochs * len(pairs) // batch)
    scorer.requires_grad_(True)
    schedule = Schedule(steps, config.reward.learning_rate, muon=config.reward.optimizer == "muon")
    return fit(scorer, losses_at, schedule, runtime, "scorers")


def _longest(texts: Sequence[EncodedText]) -> int:
    return max(sum(map(len, text)) for text in texts)

"""Small artifacts to train on: a toy world of words whose rewards and costs are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from config_kit import limited

from cdpo_core import pipeline
from cdpo_core.artifacts import files_digest, folder_files
from cdpo_core.config import ExperimentConfig
from cdpo_core.evaluation.sampling import sample_responses
from cdpo_core.learning.sft import train_sft
from cdpo_core.stages import Runtime, Slice, pick

SHARPNESS = 2.0
WORDS = {"bake": -1.0, "paint": -0.5, "break": 0.5, "burn": 1.0}
THINGS = ("bread", "boats", "doors", "maps", "cars")
OPENINGS = {"Sure,": (1.0, 1.0), "Well,": (0.0, 0.0), "No,": (-1.0, -1.5)}
ENDINGS = {"use a tool.": (0.8, 0.8), "ask a friend.": (0.2, -0.5), "wait.": (-0.6, -0.6)}
HEADS = [{"name": "reward", "labels": ""}, {"name": "harm", "labels": "harm"}]

CONFIG = limited(
    {
        "seed": 3,
        "policy": {"hidden_size": 16, "layers": 2, "heads": 2, "vocabulary_size": 320, "max_response_tokens": 12},
        "sft": {"steps": 60, "batch": 32, "learning_rate": 2e-2},
        "reward": {"epochs": 4, "batch": 32, "learning_rate": 2e-2},
        "sampling": {"reference": 8},
        "dpo": {"steps": 20, "prompts_per_step": 4, "responses_per_prompt": 4, "learning_rate": 5e-3},
    }
)


class Killed(Exception):
    """Stands for a kill signal in the middle of a training."""


def changed(**sections: dict[str, object]) -> ExperimentConfig:
    """CONFIG with some fields of some sections replaced."""
    values = CONFIG.model_dump()
    for name, fields in sections.items():
        values[name] |= fields
    return limited(values)


def sft_slice(config: ExperimentConfig = CONFIG) -> Slice:
    base = "scratch" if config.policy.base == "scratch" else "loaded"
    return pick(config, pipeline.SFT.fields, base=base)


def scorer_slice(config: ExperimentConfig = CONFIG, **extra: object) -> Slice:
    return pick(
        config, pipeline.SCORERS.fields, **{"base": "sft", "train": True, "sign": "harmful", "heads": HEADS, **extra}
    )


def round_slice(config: ExperimentConfig = CONFIG, lambda_: tuple[float, ...] = (0.5,)) -> Slice:
    return pick(config, pipeline.ROUND.fields, lambda_=list(lambda_), names=["harm"])


def digest(folder: Path) -> str:
    return files_digest(folder_files(folder))


def killed_at(step: int, scratch: Path) -> Runtime:
    """A machine that dies once the progress reaches `step`, leaving its scratch folder behind."""

    def progress(what: str, done: int, total: int) -> None:
        if done >= step:
            raise Killed

    return Runtime(scratch=scratch, progress=progress)


def truth(prompt: str, response: str) -> tuple[float, float]:
    """Reward and cost of a text of the toy world; other text is bad on both counts."""
    risk = next(value for word, value in WORDS.items() if word in prompt)
    opening = next((word for word in OPENINGS if response.startswith(word)), "")
    ending = next((words for words in ENDINGS if response.endswith(words)), "")
    if not opening or not ending:
        return -3.0, 2.0
    return OPENINGS[opening][0] + ENDINGS[ending][0], OPENINGS[opening][1] + ENDINGS[ending][1] + risk


def write_data(folder: Path, pairs: int = 12, demonstrations: int = 300) -> Path:
    """A `data` artifact: 20 prompts, half of them with labelled pairs (a fifth of those held out), half pool."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    prompts = [f"How do I {word} {thing}?" for thing in THINGS for word in WORDS]
    ids = [f"p{number:02d}" for number in range(len(prompts))]
    answers = [f"{opening} {ending}" for opening in OPENINGS for ending in ENDINGS]
    number = np.arange(len(prompts))
    labelled = (number + number // len(WORDS)) % 2 == 0
    held_out = labelled & (number >= 16)
    split = np.where(labelled, "preferences", "pool")
    table = {"prompt_id": ids, "prompt": prompts, "kind": "", "unit": ids, "split": split, "held_out": held_out}
    pd.DataFrame(table).to_parquet(folder / "prompts.parquet", index=False)
    rows = [
        _pair(ids[p], prompts[p], random.choice(answers, 2), random)
        for p in np.flatnonzero(labelled)
        for _ in range(pairs)
    ]
    frame = pd.DataFrame(rows)
    labels = ["better", "safer_harm", "unsafe_harm_0", "unsafe_harm_1"]
    frame.astype(dict.fromkeys(labels, "int8")).to_parquet(folder / "preferences.parquet", index=False)
    chosen = random.integers(len(prompts), size=demonstrations)
    said = random.choice(answers, demonstrations)
    demos = {"prompt_id": [ids[p] for p in chosen], "prompt": [prompts[p] for p in chosen], "response": said}
    pd.DataFrame(demos).to_parquet(folder / "demonstrations.parquet", index=False)
    (folder / "summary.json").write_text(json.dumps({"sharpness": SHARPNESS, "labels": ["harm"]}))
    return folder


def _pair(prompt_id: str, prompt: str, answers: np.ndarray, random: np.random.Generator) -> dict[str, object]:
    (r0, c0), (r1, c1) = truth(prompt, answers[0]), truth(prompt, answers[1])
    odds = SHARPNESS * np.array([r1 - r0, c0 - c1, c0, c1])
    better, safer, unsafe_0, unsafe_1 = (random.random(4) < 1 / (1 + np.exp(-odds))).astype(int)
    return {
        "pair_id": f"{prompt_id}-{random.integers(1 << 40)}",
        "prompt_id": prompt_id,
        "response_0": answers[0],
        "response_1": answers[1],
        "better": better,
        "safer_harm": safer,
        "unsafe_harm_0": unsafe_0,
        "unsafe_harm_1": unsafe_1,
    }


def write_chain(root: Path) -> dict[str, Path]:
    """Everything a round reads, on the toy world, with the truth as scores."""
    inputs = {"data": write_data(root / "data")}
    for name in ("reference", "responses", "scores", "splits"):
        inputs[name] = root / name
        inputs[name].mkdir()
    train_sft(sft_slice(), {"data": inputs["data"]}, inputs["reference"], Runtime())
    fields = ("seed", "policy.max_response_tokens", "policy.trust_remote_code", "sampling.temperature")
    sampling = {"policy": inputs["reference"], "data": inputs["data"]}
    sample_responses(pick(CONFIG, fields, split="pool", samples=8), sampling, inputs["responses"], Runtime())
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet").set_index("prompt_id")["prompt"]
    table = pd.read_parquet(inputs["responses"] / "responses.parquet")
    values = [truth(prompts[row.prompt_id], row.response) for row in table.itertuples()]
    scores = table[["prompt_id", "sample"]].assign(reward=[r for r, _ in values], cost_harm=[c for _, c in values])
    scores.to_parquet(inputs["scores"] / "scores.parquet", index=False)
    pool = pd.DataFrame({"prompt_id": sorted(set(table["prompt_id"]))})
    pool.assign(split=["policy"] * 8 + ["test"] * (len(pool) - 8)).to_parquet(
        inputs["splits"] / "splits.parquet", index=False
    )
    return inputs

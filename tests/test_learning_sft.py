"""Supervised fine-tuning: what it learns, bases, continuation, micro-batches, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from learning_kit import Killed, changed, digest, killed_at, sft_slice, write_data

from cdpo_core.errors import InputError, TrainingError
from cdpo_core.learning.sft import demonstration_log_probs, train_sft
from cdpo_core.models.logprobs import token_log_probs
from cdpo_core.models.policy import load_policy
from cdpo_core.stages import Runtime


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("sft") / "data")


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference")
    train_sft(sft_slice(), {"data": data}, out, Runtime())
    return out


def test_it_learns_the_demonstrations(reference: Path) -> None:
    steps = json.loads((reference / "training.json").read_text())["steps"]
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    policy = load_policy(reference)
    prompt = policy.encode_prompts(["How do I bake maps?"])[0]
    likely, unlikely = policy.encode_responses(["Sure, use a tool.", "tool Sure, a use."])
    with torch.no_grad():
        assert token_log_probs(policy.model, prompt, likely).sum() > -6
        assert token_log_probs(policy.model, prompt, unlikely).sum() < -12


def test_the_folder_names_no_machine(reference: Path) -> None:
    names = {path.name for path in reference.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "policy.json", "training.json"} <= names
    assert str(reference.parent) not in "".join(path.read_text() for path in reference.glob("*.json"))


def test_a_killed_run_continues_to_the_same_bytes(reference: Path, data: Path, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with pytest.raises(Killed):
        train_sft(sft_slice(), {"data": data}, tmp_path / "lost", killed_at(31, scratch))
    train_sft(sft_slice(), {"data": data}, out, Runtime(scratch=scratch))
    assert digest(out) == digest(reference)


def test_micro_batches_change_nothing_but_rounding(reference: Path, data: Path, tmp_path: Path) -> None:
    config = sft_slice(changed(sft={"steps": 5}))
    for name, micro_batch in (("whole", 0), ("parts", 5)):
        train_sft(config, {"data": data}, tmp_path / name, Runtime(micro_batch=micro_batch))
    whole, parts = (json.loads((tmp_path / name / "training.json").read_text())["steps"] for name in ("whole", "parts"))
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in whole], rel=1e-3)


def test_shared_prompts_give_the_plain_log_probs(reference: Path) -> None:
    policy = load_policy(reference)
    prompts = policy.encode_prompts(["How do I bake maps?", "How?", "How do I burn all of the old doors?"])
    responses = policy.encode_responses(["Sure, wait.", "No, ask a friend.", "", "Well, use a tool."])
    places = np.array([2, 0, 2, 1])
    with torch.no_grad():
        shared = demonstration_log_probs(policy, prompts, places, responses)
        plain = [
            token_log_probs(policy.model, prompts[place], response).sum()
            for place, response in zip(places, responses, strict=True)
        ]
    torch.testing.assert_close(shared, torch.stack(plain).double(), atol=1e-4, rtol=1e-5)


def test_a_ready_base_is_taken_as_it_is(reference: Path, data: Path, tmp_path: Path) -> None:
    config = sft_slice(changed(sft={"train": False}, policy={"base": "somewhere", "max_response_tokens": 7}))
    train_sft(config, {"data": data, "base": reference}, tmp_path, Runtime())
    assert json.loads((tmp_path / "training.json").read_text()) == {"steps": []}
    assert (tmp_path / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert load_policy(tmp_path).max_response_tokens == 7


def test_a_base_is_trained_further_and_kept_in_its_number_format(reference: Path, data: Path, tmp_path: Path) -> None:
    config = sft_slice(changed(sft={"steps": 4}, policy={"base": "somewhere", "dtype": "bfloat16"}))
    train_sft(config, {"data": data, "base": reference}, tmp_path, Runtime())
    assert load_policy(tmp_path).model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "training.json").read_text())["steps"][0]["loss"] < 1.5


def test_scratch_without_training_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scratch needs training"):
        train_sft(sft_slice(changed(sft={"train": False})), {"data": data}, tmp_path, Runtime())


def test_no_demonstrations_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"prompt_id": [], "prompt": [], "response": []}).to_parquet(tmp_path / "demonstrations.parquet")
    with pytest.raises(InputError, match="no demonstrations"):
        train_sft(sft_slice(), {"data": tmp_path}, tmp_path / "out", Runtime())


def test_an_exploding_run_is_a_training_error(data: Path, tmp_path: Path) -> None:
    config = sft_slice(changed(sft={"learning_rate": 1e30}))
    with pytest.raises(TrainingError, match="sft loss is not finite"):
        train_sft(config, {"data": data}, tmp_path, Runtime())

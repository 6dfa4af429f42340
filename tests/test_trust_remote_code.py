"""Code that comes with a model runs only where its switch is on: one for the policy, the reward and each cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_line_kit import command_line
from learning_kit import scorer_slice
from test_data_input import pair_rows, write_lines

from cdpo_core import pipeline
from cdpo_core.config import ExperimentConfig, PolicyConfig
from cdpo_core.errors import InputError
from cdpo_core.learning.preference import _starting_scorer
from cdpo_core.learning.score import score_responses
from cdpo_core.learning.sft import train_sft
from cdpo_core.models.policy import load_policy
from cdpo_core.models.scorer import save_scorer
from cdpo_core.models.tokenizer import train_tokenizer
from cdpo_core.stages import Runtime, Slice, pick
from tasks.preference_models import trusted_scorers

CODE = """
import os, pathlib
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

class MarkedConfig(LlamaConfig):
    model_type = "marked"

    def __init__(self, **fields):
        pathlib.Path(os.environ["CDPO_TEST_MARKER"]).touch()
        super().__init__(**fields)

class MarkedModel(LlamaModel):
    config_class = MarkedConfig

class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig

class MarkedForSequenceClassification(LlamaPreTrainedModel):
    config_class = MarkedConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = MarkedModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
"""
ROOT = Path(__file__).parent.parent
SECTIONS = ("policy", "reward", "constraints.0")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CDPO_TEST_MARKER", str(tmp_path / "ran"))
    return tmp_path / "ran"


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """A model folder of a kind that transformers does not know, with code for it."""
    return _marked(tmp_path / "marked", "MarkedForCausalLM")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return _marked(tmp_path / "classifier", "MarkedForSequenceClassification")


def _marked(folder: Path, architecture: str) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = train_tokenizer(["how do I boil an egg", "in water", "ask a friend"] * 20, 300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)
    is_policy = architecture == "MarkedForCausalLM"
    torch.manual_seed(0)
    (LlamaForCausalLM if is_policy else LlamaForSequenceClassification)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_marked.py").write_text(CODE)
    saved = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "MarkedConfig", "AutoModel": "MarkedModel", "AutoModelForCausalLM": "MarkedForCausalLM"}
    names["AutoModelForSequenceClassification"] = "MarkedForSequenceClassification"
    code = {name: f"modeling_marked.{value}" for name, value in names.items()}
    saved |= {"model_type": "marked", "architectures": [architecture], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def config_with(**sections: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"constraints": [{"limit": 0}], **sections})


def policy_slice(fields: tuple[str, ...], trusted: bool, **extra: Any) -> Slice:
    config = config_with(policy={"base": "x", "trust_remote_code": trusted}, sft={"train": False})
    return pick(config, fields, **extra)


def test_a_policy_s_code_runs_with_the_policy_s_switch_alone(tmp_path: Path, marked: Path, marker: Path) -> None:
    sft, read = tmp_path / "sft", PolicyConfig(base="x", trust_remote_code=True)
    pd.DataFrame({"prompt": ["ask"], "response": ["a friend"]}).to_parquet(tmp_path / "demonstrations.parquet")
    pd.DataFrame({"prompt": ["ask"]}).to_parquet(tmp_path / "prompts.parquet")
    pd.DataFrame({"response_0": ["a friend"], "response_1": ["no"]}).to_parquet(tmp_path / "preferences.parquet")
    inputs = {"base": marked, "data": tmp_path}
    for trusted in (False, True):
        config = policy_slice(pipeline.SFT.fields, trusted, base="loaded")
        if not trusted:
            with pytest.raises(InputError, match="code of its own, which is not run"):
                train_sft(config, inputs, sft, Runtime())
            assert not marker.exists()
            continue
        train_sft(config, inputs, sft, Runtime())
        assert marker.exists()
    marker.unlink()
    # What is saved of it asks again wherever it is read: by every stage that has a policy, and by a scorer from it.
    assert "policy.trust_remote_code" in pipeline.RESPONSES.fields
    with pytest.raises(InputError, match="code of its own"):
        load_policy(sft)
    with pytest.raises(InputError, match="code of its own"):
        _starting_scorer(scorer_slice(base="sft"), {"sft": sft})
    assert not marker.exists()
    assert load_policy(sft, config_policy=read).model.config.model_type == "marked"
    assert _starting_scorer(scorer_slice(base="sft", trusted=True), {"sft": sft}).names == ["reward", "harm"]
    assert marker.exists()


def test_every_stage_that_loads_a_policy_has_its_switch() -> None:
    stages = [item for item in vars(pipeline).values() if isinstance(item, pipeline.Stage)]
    others = {"data", "splits", "scorers", "scores", "judgement"}
    assert {stage.name for stage in stages if "load_policy(" not in _source(stage)} <= others
    for stage in stages:
        assert ("policy.trust_remote_code" in stage.fields) == (stage.name not in others), stage.name


def _source(stage: Any) -> str:
    return (ROOT / f"{stage.compute.__module__.replace('.', '/')}.py").read_text()


def test_no_model_is_loaded_without_saying_whether_its_code_may_run() -> None:
    for path in (ROOT / "cdpo_core").rglob("*.py"):
        for call in re.findall(
            r"(?:load_scorer|load_backbone|new_scorer|load_ready_scorer)\([^()]*(?:\([^()]*\)[^()]*)*\)",
            path.read_text(),
        ):
            assert "trust" in call, (path, call)


@pytest.mark.parametrize("train", [True, False])
def test_a_scorer_s_code_runs_with_its_own_switch_alone(
    tmp_path: Path, marked: Path, classifier: Path, marker: Path, train: bool
) -> None:
    inputs = {"base": marked if train else classifier}
    config = {"base": "loaded", "train": train, "heads": [{"name": "reward", "labels": ""}]}
    with pytest.raises(InputError, match="code of its own"):
        _starting_scorer(scorer_slice(**config), inputs)
    assert not marker.exists()
    scorer = _starting_scorer(scorer_slice(**config, trusted=True), inputs)
    assert marker.exists()
    marker.unlink()

    folders = {name: tmp_path / name for name in ("data", "responses", "scorers_0", "out")}
    for folder in folders.values():
        folder.mkdir()
    save_scorer(scorer, folders["scorers_0"])
    pd.DataFrame({"prompt_id": ["a"], "prompt": ["ask"], "unit": ["a"]}).to_parquet(folders["data"] / "prompts.parquet")
    drawn = pd.DataFrame({"prompt_id": ["a"], "sample": [0], "response": ["a friend"]})
    drawn.to_parquet(folders["responses"] / "responses.parquet")
    out = folders.pop("out")
    scoring: dict[str, Any] = {"constraints": [], "oracle": False}
    with pytest.raises(InputError, match="code of its own"):
        score_responses(Slice(scoring), folders, out, Runtime())
    with pytest.raises(InputError, match="code of its own"):
        score_responses(Slice({**scoring, "trusted": ["scorers_1"]}), folders, out, Runtime())
    assert not marker.exists()
    score_responses(Slice({**scoring, "trusted": ["scorers_0"]}), folders, out, Runtime())
    assert marker.exists()


def test_each_switch_is_for_the_model_beside_it() -> None:
    def trusted(*switched: str, reward: str = "r", harm: str = "h", bias: str = "b") -> list[str]:
        config = ExperimentConfig.model_validate(
            {
                "policy": {"base": "p", "trust_remote_code": "policy" in switched},
                "reward": {"base": reward, "trust_remote_code": "reward" in switched},
                "constraints": [
                    {"name": "harm", "limit": 0, "base": harm, "trust_remote_code": "harm" in switched},
                    {"name": "bias", "limit": 0, "base": bias, "trust_remote_code": "bias" in switched},
                ],
            }
        )
        return trusted_scorers(config).get("trusted", [])

    assert trusted() == trusted("policy") == []
    assert (trusted("reward"), trusted("harm"), trusted("bias")) == (["scorers_0"], ["scorers_1"], ["scorers_2"])
    # What starts from the policy has the policy's; a cost that shares the reward model is no model of its own.
    assert trusted("policy", reward="sft", harm="scratch") == ["scorers_0", "scorers_1"]
    assert trusted("policy", "reward", harm="reward", bias="reward") == ["scorers_0"]
    assert trusted("reward", harm="sft", bias="sft") == ["scorers_0"]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_run_is_refused_before_it_starts(tmp_path: Path, marked: Path, marker: Path, section: str) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", pair_rows())
    run = ["run", "xstest", "--data.source", str(source)]
    said = command_line([*run, f"--{section}.base", str(marked)], tmp_path / "home")
    assert said.code == 2
    assert f"{section}.base: the model comes with code of its own, which is not run" in said.error
    assert f"where: {marked}" in said.error
    for other in {"policy", "reward", "constraints.0"} - {section}:
        switches = [f"--{section}.base", str(marked), f"--{other}.trust_remote_code", "true"]
        said = command_line([*run, *switches], tmp_path / "home")
        assert said.code == 2
        assert "names no model whose code could run" in said.error
        assert f"where: {other}.trust_remote_code" in said.error
    assert not marker.exists()

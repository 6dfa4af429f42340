"""How responses are drawn belongs to the certificate: exported, sampled and told with the policy."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import report_kit
import torch
from transformers import AutoModelForCausalLM

from cdpo_core.config import PolicyConfig
from cdpo_core.evaluation.decoding import Decoding, decoding_of, decoding_words, departures, generation_settings
from cdpo_core.evaluation.result import verdict
from cdpo_core.models.policy import Policy, new_policy, save_policy
from cdpo_core.models.tokenizer import train_tokenizer
from flows import export
from flows.export import _write_decoding, model_card
from flows.sampling import open_drawer
from tasks.metric_points import certificate_tags
from tasks.report_words import limits_of_meaning

CONFIG = PolicyConfig(hidden_size=16, layers=1, heads=2, vocabulary_size=300, max_prompt_tokens=24)
COLD = Decoding(0.5, 7, 24, "{prompt}", (2,)).record()


@pytest.fixture(scope="module")
def policy() -> Policy:
    return new_policy(CONFIG, train_tokenizer(["how do I bake bread", "with care"] * 20, 300), 0)


@pytest.fixture
def folder(policy: Policy, tmp_path: Path) -> Path:
    """A policy whose base sampled otherwise than we do."""
    save_policy(policy, tmp_path / "policy")
    path = tmp_path / "policy" / "generation_config.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(saved | {"top_p": 0.1, "repetition_penalty": 1.5, "do_sample": True, "min_p": 0.2}))
    return tmp_path / "policy"


def result(decoding: dict[str, Any] | None = COLD) -> dict[str, Any]:
    record = report_kit.result()
    if decoding:
        record["certificate"]["decoding"] = decoding
    return record


def test_the_settings_are_read_from_the_policy(folder: Path, policy: Policy) -> None:
    found = decoding_of(folder, 0.5, 7)
    assert (found.temperature, found.max_new_tokens, found.max_prompt_tokens, found.template) == (
        0.5,
        7,
        24,
        "{prompt}",
    )
    assert found.ends == (policy.eos_id,)
    assert "temperature 0.5, at most 7 tokens" in decoding_words(found.record())
    assert departures(COLD, {"temperature": 0.5, "max_new_tokens": 7}) == []
    assert departures(COLD, {"temperature": 1.0, "max_new_tokens": 7}) == ["temperature 1.0 instead of 0.5"]


def test_transformers_draws_an_exported_policy_from_the_certified_distribution(folder: Path, policy: Policy) -> None:
    _write_decoding(folder, result())
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor(policy.encode_prompts(["how do I bake bread"]))
    torch.manual_seed(0)
    drawn = model.generate(prompt, output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert drawn.sequences.shape[1] - prompt.shape[1] <= 7
    for scores, logits in zip(drawn.scores, drawn.logits, strict=True):
        # No top-k (50 where nothing is said), top-p, penalty: nothing but the temperature.
        assert torch.equal(scores, logits / 0.5)
    assert model.generation_config.do_sample
    assert model.generation_config.eos_token_id == 2


def test_a_policy_of_no_test_is_exported_as_it_is(folder: Path) -> None:
    _write_decoding(folder, None)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["top_k"], saved["max_new_tokens"]) == (1.0, 1.0, 0, 32)
    assert "repetition_penalty" not in saved
    assert not (folder / "decoding.json").exists()


def test_several_ends_are_kept(folder: Path) -> None:
    assert generation_settings(folder, COLD | {"ends": [1, 5]})["eos_token_id"] == [1, 5]


def test_sampling_an_exported_policy_is_as_it_was_tested(folder: Path) -> None:
    _write_decoding(folder, result())
    drawer = open_drawer(str(folder), None, CONFIG)
    assert (drawer.temperature, drawer.model.max_response_tokens) == (0.5, 7)
    assert drawer.said[0].endswith("as tested")
    ((_, (response,)),) = drawer.draw(["how do I bake bread"], 1, 0)
    assert isinstance(response, str)
    longer = CONFIG.model_copy(update={"max_response_tokens": 9})
    told = open_drawer(str(folder), 1.0, longer, ["max_response_tokens"])
    assert (told.temperature, told.model.max_response_tokens) == (1.0, 9)
    assert told.said[1].startswith("warning: it was tested with other settings")
    assert all(words in told.said[1] for words in ("temperature 1.0 instead of 0.5", "max_new_tokens 9 instead of 7"))


def test_sampling_by_reference_uses_the_certificate_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = types.SimpleNamespace(fetch=lambda manifest: folder)
    monkeypatch.setattr(export, "find_policy", lambda *_: (store, None))
    monkeypatch.setattr(export, "result_of", lambda *_: result())
    drawer = open_drawer("round/0123", None, CONFIG)
    assert (drawer.temperature, drawer.said[0][-12:]) == (0.5, "as certified")
    monkeypatch.setattr(export, "result_of", lambda *_: None)
    drawer = open_drawer("round/0123", None, CONFIG)
    assert (drawer.temperature, drawer.model.max_response_tokens) == (1.0, 32)
    assert "no test" in drawer.said[0]


def test_the_words_of_a_certificate_name_it() -> None:
    record = result()
    manifest: Any = types.SimpleNamespace(digest="d", stage="round", created="today", versions={})
    record |= {"seed": 0}
    assert "at temperature 0.5 of at most 7 tokens" in verdict(record)
    assert any("temperature 0.5, at most 7 tokens" in line for line in limits_of_meaning(record))
    assert "temperature 0.5, at most 7 tokens" in certificate_tags(record["certificate"])["certificate.decoding"]
    assert "drawn at temperature 0.5, at most 7 tokens" in model_card(manifest, record)

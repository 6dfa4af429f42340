"""Policies: tokens at the borders, loading, refusing, saving, adapters."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cdpo_core.config import PolicyConfig
from cdpo_core.errors import InputError
from cdpo_core.models.checkpoints import is_local
from cdpo_core.models.policy import (
    Policy,
    check_model_folder,
    load_policy,
    merged,
    new_policy,
    save_policy,
    with_lora,
)
from cdpo_core.models.tokenizer import train_tokenizer

SMALL = PolicyConfig(hidden_size=16, layers=2, heads=2, max_prompt_tokens=12, max_response_tokens=5)
TEXTS = ["How do I bake a cake?", "How do I fix a bike?", " Sure, take flour.", " I cannot help with that."] * 3
BOS, EOS = 1, 2


def small_policy(seed: int = 0, **changes: object) -> Policy:
    return new_policy(SMALL.model_copy(update=changes), train_tokenizer(TEXTS, 300), seed)


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(torch.tensor([[1, 5, 9, 200, 33]])).logits


def folder_bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_prompt_has_one_bos_and_loses_its_left_end() -> None:
    policy = small_policy()
    short, long = policy.encode_prompts(["How do I", "How do I " * 20])
    assert short.count(BOS) == 1
    assert short[0] == BOS
    assert len(long) == 12
    assert long[0] == BOS
    assert policy.tokenizer.decode(long[1:]) == ("How do I " * 20)[-len(policy.tokenizer.decode(long[1:])) :]


def test_template_surrounds_the_prompt_and_may_write_special_tokens() -> None:
    plain = small_policy()
    policy = Policy(plain.model, plain.tokenizer, "<bos>Q: {prompt}\nA:", 64, 5)
    (tokens,) = policy.encode_prompts(["a {b} <c>"])
    assert tokens.count(BOS) == 1, "the template's BOS is the one"
    assert policy.decode(tokens) == "Q: a {b} <c>\nA:"


def test_chat_template() -> None:
    plain = small_policy()
    plain.tokenizer.chat_template = "<bos>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    (tokens,) = Policy(plain.model, plain.tokenizer, "chat", 64, 5).encode_prompts(["hello"])
    assert tokens.count(BOS) == 1
    assert plain.decode(tokens) == "[user] hello"


def test_a_users_special_words_stay_words() -> None:
    policy = small_policy(max_prompt_tokens=64, max_response_tokens=64)
    (prompt,), (response,) = policy.encode_prompts(["a <eos> b"]), policy.encode_responses([" no <eos> yes"])
    assert EOS not in prompt
    assert response.count(EOS) == 1
    assert policy.decode(response) == " no <eos> yes"


@pytest.mark.parametrize(
    ("text", "ends"),
    [("", True), (" Sure", True), ("never seen before, so cut", False)],
)
def test_response_ends_with_one_eos_unless_cut(text: str, ends: bool) -> None:
    policy = small_policy()
    (tokens,) = policy.encode_responses([text])
    assert len(tokens) <= 5
    assert tokens.count(EOS) == int(ends)
    assert (tokens[-1] == EOS) is ends


def test_seed_names_the_weights_and_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = small_policy(0), small_policy(0), small_policy(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))


def test_save_and_load_give_the_same_policy_and_the_same_bytes(tmp_path: Path) -> None:
    policy = small_policy()
    save_policy(policy, tmp_path / "a")
    loaded = load_policy(tmp_path / "a")
    save_policy(loaded, tmp_path / "b")
    assert torch.equal(logits(policy), logits(loaded))
    assert (loaded.template, loaded.max_prompt_tokens, loaded.max_response_tokens) == ("{prompt}", 12, 5)
    assert loaded.encode_prompts(TEXTS) == policy.encode_prompts(TEXTS)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    saved = "".join(path.read_text() for path in (tmp_path / "b").glob("*.json"))
    assert str(tmp_path) not in saved
    assert "transformers_version" not in saved


def test_the_configs_fields_win_over_the_folders(tmp_path: Path) -> None:
    save_policy(small_policy(), tmp_path)
    config = PolicyConfig(template="Q {prompt}", max_prompt_tokens=9, max_response_tokens=7, dtype="bfloat16")
    loaded = load_policy(tmp_path, config_policy=config)
    assert (loaded.template, loaded.max_prompt_tokens, loaded.max_response_tokens) == ("Q {prompt}", 9, 7)
    assert loaded.model.dtype == torch.bfloat16
    assert load_policy(tmp_path, config_policy=config, dtype=torch.float32).model.dtype == torch.float32


SAVE = """
import sys
sys.path[:0] = sys.argv[2:4]
from pathlib import Path
from test_models_policy import save_policy, small_policy
save_policy(small_policy(), Path(sys.argv[1]))
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    save_policy(small_policy(), tmp_path / "here")
    tests = Path(__file__).parent
    command = [sys.executable, "-c", SAVE, str(tmp_path / "there"), str(tests), str(tests.parent)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": "5"})
    assert folder_bytes(tmp_path / "here") == folder_bytes(tmp_path / "there")


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "cut short or damaged"),
        (cut_header, "cut short or damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 4000), "cut short or damaged"),
        (pickle_only, "save_pretrained"),
        (missing_shard, "1 of 1 weight files are missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no object"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Callable[[Path], object], what: str) -> None:
    save_policy(small_policy(), tmp_path)
    check_model_folder(tmp_path)
    damage(tmp_path)
    for refuse in (check_model_folder, load_policy):
        with pytest.raises(InputError, match=what) as caught:
            refuse(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_missing_folder_and_unknown_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_policy("nobody/no-such-model", config_policy=PolicyConfig())


def test_a_name_is_a_path_only_if_it_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    names = ["/a", "./a", "~/a", "models", "owner/name", "gpt2"]
    assert [is_local(name) for name in names] == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"template": "no place"}, "does not hold"),
        ({"template": "chat"}, "no chat template"),
        ({"hidden_size": 18}, "cannot be split"),
    ],
)
def test_unusable_settings_are_refused(changes: dict[str, object], what: str) -> None:
    with pytest.raises(InputError, match=what):
        small_policy(**changes)


def test_a_foreign_folder_needs_the_configs_settings(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="nothing says the policy's template"):
        load_policy(tmp_path)
    assert load_policy(tmp_path, config_policy=PolicyConfig()).template == "{prompt}"


def test_lora_starts_at_the_policy_trains_only_adapters_and_saves_merged(tmp_path: Path) -> None:
    policy = small_policy()
    start = logits(policy)
    adapted = with_lora(policy, rank=2, seed=0)
    torch.testing.assert_close(logits(adapted), start)
    trainable = [(name, p) for name, p in adapted.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name, _ in trainable)
    with torch.no_grad():
        for _, parameter in trainable:
            parameter.add_(0.1)
    moved = logits(adapted)
    assert (moved - start).abs().max() > 1e-3
    save_policy(adapted, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    torch.testing.assert_close(logits(load_policy(tmp_path)), moved, atol=1e-5, rtol=1e-5)
    whole = small_policy()
    assert merged(whole) is whole


def test_lora_adapters_come_from_the_seed() -> None:
    def adapters(seed: int) -> list[torch.Tensor]:
        return [p for p in with_lora(small_policy(), 2, seed).model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(adapters(3), adapters(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(adapters(3), adapters(4), strict=True))

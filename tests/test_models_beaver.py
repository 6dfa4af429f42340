"""Beaver checkpoints: the bias, the normalizer, the text, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaModel

from cdpo_core.errors import InputError
from cdpo_core.models.beaver import beaver_text, is_beaver_folder, load_beaver
from cdpo_core.models.tokenizer import train_tokenizer

WIDTH = 16
PROMPTS, RESPONSES = ["hello", "how are you today", "x"], ["Hi!", "", "A long answer that goes on for a while."]


def write_checkpoint(folder: Path, extra: dict[str, torch.Tensor] | None = None, **config: object) -> LlamaModel:
    """A tiny checkpoint as the Beaver authors' code writes it."""
    torch.manual_seed(0)
    architecture = LlamaConfig(
        vocab_size=259, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    body = LlamaModel(architecture).eval()
    tensors = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    tensors["score_head.weight"] = torch.linspace(-1, 1, WIDTH)[None]
    train_tokenizer(["a"], 259).save_pretrained(folder)
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    keys = {"architectures": ["LlamaForScore"], "score_dim": 1, "score_type": "cost", "do_normalize": False, **config}
    (folder / "config.json").write_text(json.dumps({**architecture.to_dict(), **keys}))
    return body


def by_hand(body: LlamaModel, folder: Path, *, end: bool = True) -> torch.Tensor:
    tokenizer = train_tokenizer(["a"], 259)
    scores = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}" + "<eos>" * end
        with torch.no_grad():
            hidden = body(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0, -1]
        scores.append(hidden @ torch.linspace(-1, 1, WIDTH))
    return torch.stack(scores)


@pytest.mark.parametrize("end", [True, False])
def test_scores_are_read_at_the_last_token(tmp_path: Path, end: bool) -> None:
    body = write_checkpoint(tmp_path)
    model = load_beaver(tmp_path, end_token=end)
    expected = by_hand(body, tmp_path, end=end)
    assert model.score_type == "cost"
    for micro_batch in (1, 2, 16):
        torch.testing.assert_close(model.score(PROMPTS, RESPONSES, micro_batch), expected, atol=1e-5, rtol=1e-5)
    assert model.score([], []).shape == (0,)


@pytest.mark.parametrize("said", [{"score_bias": True}, {"bias": False}, {}])
def test_the_bias_is_what_the_file_holds_and_not_what_the_config_says(tmp_path: Path, said: dict[str, bool]) -> None:
    body = write_checkpoint(tmp_path, {"score_head.bias": torch.tensor([5.0])}, **said)
    expected = by_hand(body, tmp_path) + 5
    torch.testing.assert_close(load_beaver(tmp_path).score(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=1e-5)
    write_checkpoint(tmp_path, **said)
    assert load_beaver(tmp_path).head.bias is None


@pytest.mark.parametrize(
    ("kind", "asked", "shift", "scale"),
    [("reward", True, 3, 2), ("cost", True, 0, 2), ("critic", True, 0, 1), ("reward", False, 0, 1)],
)
@pytest.mark.parametrize("place", ["weights", "config"])
def test_normalizer(tmp_path: Path, kind: str, asked: bool, shift: float, scale: float, place: str) -> None:
    statistics = {"mean": [3.0], "var": [4.0]}
    extra = {f"normalizer.{name}": torch.tensor(value) for name, value in statistics.items()}
    extra["normalizer.count"] = torch.tensor([9])
    config = {"score_type": kind, "do_normalize": asked}
    if place == "weights":
        body = write_checkpoint(tmp_path, extra, **config)
    else:
        body = write_checkpoint(tmp_path, None, **config, **statistics)
    expected = (by_hand(body, tmp_path) - shift) / scale
    torch.testing.assert_close(load_beaver(tmp_path).score(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=1e-5)


def test_old_rotary_buffers_are_ignored_and_other_keys_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load_beaver(tmp_path)
    write_checkpoint(tmp_path, {"lm_head.weight": torch.ones(4)})
    with pytest.raises(InputError, match="unknown"):
        load_beaver(tmp_path)


def test_a_folder_without_a_head_or_with_pickles_is_refused(tmp_path: Path) -> None:
    body = write_checkpoint(tmp_path)
    tensors = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="missing"):
        load_beaver(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        load_beaver(tmp_path)


def test_a_normalizing_checkpoint_without_statistics_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, score_type="reward", do_normalize=True)
    with pytest.raises(InputError, match="no mean"):
        load_beaver(tmp_path)


def test_which_folders_are_beaver(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert is_beaver_folder(tmp_path)
    write_checkpoint(tmp_path, architectures=["LlamaForCausalLM"])
    assert not is_beaver_folder(tmp_path)


def test_text_of_several_turns() -> None:
    turns = [("hi", "Hello."), ("bye", "Bye.")]
    expected = "BEGINNING OF CONVERSATION: USER: hi ASSISTANT:Hello.</s>USER: bye ASSISTANT:Bye."
    assert beaver_text(turns, "</s>", ended=False) == expected
    assert beaver_text(turns, "</s>", ended=True) == expected + "</s>"

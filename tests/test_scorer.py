"""Scorers: shared prompt passes, calibration, saving, ready models of others, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learning_kit import digest
from test_models_beaver import write_checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Tokenizer

from cdpo_core.config import PolicyConfig
from cdpo_core.errors import InputError
from cdpo_core.models.beaver import load_beaver
from cdpo_core.models.policy import new_policy, save_policy
from cdpo_core.models.ready_scorer import load_ready_scorer, new_scorer
from cdpo_core.models.scorer import Scorer, load_scorer, save_scorer
from cdpo_core.models.tokenizer import train_tokenizer

SMALL = PolicyConfig(hidden_size=16, layers=2, heads=2, max_prompt_tokens=20, max_response_tokens=12)
PROMPTS = ["How do I bake a cake?", "How?", "How do I bake a cake?", "How do I fix my old bike today?"]
RESPONSES = ["Sure, take flour.", "No.", "", "I cannot help with that, but a friend can."]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(new_policy(SMALL, train_tokenizer([*PROMPTS, *RESPONSES] * 3, 300), 0), folder)
    return folder


def a_scorer(reference: Path) -> Scorer:
    """A scorer with two heads of random weights and some calibration."""
    scorer = new_scorer(reference, ["reward", "harm"], 20, 12)
    torch.nn.init.normal_(scorer.heads.weight, generator=torch.Generator().manual_seed(0))
    scorer.scale.copy_(torch.tensor([2.0, 0.5]))
    scorer.shift.copy_(torch.tensor([0.0, -1.0]))
    return scorer.eval()


def by_hand(scorer: Scorer) -> torch.Tensor:
    """Each text alone, without sharing or padding."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        tokens = scorer.writer.encode_prompts([prompt])[0] + scorer.writer.encode_responses([response])[0]
        hidden = scorer.backbone(torch.tensor([tokens])).last_hidden_state[0, -1]
        rows.append(scorer.heads(hidden).double() * scorer.scale + scorer.shift)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_shared_and_padded_passes_give_what_each_text_gives_alone(reference: Path, micro_batch: int) -> None:
    scorer = a_scorer(reference)
    torch.testing.assert_close(scorer.score(PROMPTS, RESPONSES, micro_batch), by_hand(scorer), atol=1e-5, rtol=1e-5)


def test_sharing_a_prompt_keeps_the_gradient(reference: Path) -> None:
    scorer = a_scorer(reference)
    texts = scorer.encode(PROMPTS, RESPONSES)
    gradients = []
    for hidden in (scorer._shared_prompt_hidden(texts), scorer._plain_hidden(texts)):
        scorer.zero_grad()
        hidden.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in scorer.backbone.parameters()])
    for shared, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, plain, atol=1e-4, rtol=1e-3)


def test_equal_texts_are_read_once_and_no_text_is_fine(reference: Path) -> None:
    scorer, seen = a_scorer(reference), []
    scores = scorer.score(PROMPTS * 3, RESPONSES * 3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    assert torch.equal(scores[:4], scores[8:])
    assert scorer.score([], []).shape == (0, 2)


def test_a_saved_scorer_comes_back_and_equal_ones_have_equal_bytes(reference: Path, tmp_path: Path) -> None:
    scorer = a_scorer(reference)
    save_scorer(scorer, tmp_path / "one")
    loaded = load_scorer(tmp_path / "one")
    save_scorer(loaded, tmp_path / "two")
    assert loaded.names == ["reward", "harm"]
    assert torch.equal(loaded.score(PROMPTS, RESPONSES), scorer.score(PROMPTS, RESPONSES))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "one").glob("*.json"))


def test_scratch_weights_come_from_the_seed(reference: Path) -> None:
    first, again, other = (new_scorer(reference, ["reward"], 20, 12, scratch_seed=seed) for seed in (1, 1, 2))
    ready = new_scorer(reference, ["reward"], 20, 12)
    weight = first.backbone.embed_tokens.weight
    assert torch.equal(weight, again.backbone.embed_tokens.weight)
    assert not torch.equal(weight, other.backbone.embed_tokens.weight)
    assert not torch.equal(weight, ready.backbone.embed_tokens.weight)


def test_heads_are_chosen_by_name_and_may_be_flipped(reference: Path, tmp_path: Path) -> None:
    scorer = a_scorer(reference)
    save_scorer(scorer, tmp_path)
    harm = load_ready_scorer(tmp_path, ["harm"], 20, 12, flip=True)
    torch.testing.assert_close(harm.score(PROMPTS, RESPONSES), -scorer.score(PROMPTS, RESPONSES)[:, 1:])
    with pytest.raises(InputError, match="no head named 'insult'"):
        load_ready_scorer(tmp_path, ["insult"], 20, 12)


@pytest.mark.parametrize(
    "normalizer", [{}, {"normalizer.mean": torch.tensor([3.0]), "normalizer.var": torch.tensor([4.0])}]
)
@pytest.mark.parametrize("bias", [{}, {"score_head.bias": torch.tensor([5.0])}])
def test_a_beaver_model_scores_as_its_own_loader_does(
    tmp_path: Path, bias: dict[str, torch.Tensor], normalizer: dict[str, torch.Tensor]
) -> None:
    write_checkpoint(tmp_path, {**bias, **normalizer}, score_type="reward", do_normalize=bool(normalizer))
    scorer = load_ready_scorer(tmp_path, ["harm"], 64, 64)
    expected = load_beaver(tmp_path).score(PROMPTS, RESPONSES).double()
    torch.testing.assert_close(scorer.score(PROMPTS, RESPONSES)[:, 0], expected, atol=1e-5, rtol=1e-5)
    save_scorer(scorer, tmp_path / "saved")
    again = load_scorer(tmp_path / "saved").score(PROMPTS, RESPONSES)
    torch.testing.assert_close(again, scorer.score(PROMPTS, RESPONSES), atol=1e-5, rtol=1e-5)


def write_classifier(folder: Path, kind: str, labels: int = 1) -> Tokenizer:
    """A tiny one-label classifier: a decoder whose pad token is its EOS, or an encoder with its own pooler."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([*PROMPTS, *RESPONSES] * 3, 300)
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    if kind == "decoder":
        tokenizer.pad_token = tokenizer.eos_token
        config = LlamaConfig(
            **shape,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_labels=labels,
            pad_token_id=2,
            initializer_range=0.3,
        )
        LlamaForSequenceClassification(config).save_pretrained(folder)
    else:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        config = BertConfig(**shape, num_attention_heads=2, num_labels=labels, pad_token_id=0, initializer_range=0.3)
        BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_decoder_classifier_is_read_at_its_last_token(tmp_path: Path) -> None:
    tokenizer = write_classifier(tmp_path, "decoder")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    scores = load_ready_scorer(tmp_path, ["harm"], 64, 64).score(PROMPTS, RESPONSES)
    for row, texts in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            logit = model(**tokenizer(*texts, return_tensors="pt", return_token_type_ids=False)).logits[0, 0]
        assert scores[row, 0].item() == pytest.approx(logit.item(), abs=1e-5)


def test_an_encoder_classifier_keeps_its_pooler_and_segments(tmp_path: Path) -> None:
    tokenizer = write_classifier(tmp_path, "encoder")
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    scorer = load_ready_scorer(tmp_path, ["harm"], 64, 64)
    save_scorer(scorer, tmp_path / "saved")
    for scores in (scorer.score(PROMPTS, RESPONSES), load_scorer(tmp_path / "saved").score(PROMPTS, RESPONSES)):
        for row, texts in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            with torch.no_grad():
                logit = model(**tokenizer(*texts, return_tensors="pt", return_token_type_ids=True)).logits[0, 0]
            assert scores[row, 0].item() == pytest.approx(logit.item(), abs=1e-5)


def test_an_encoder_can_be_a_backbone_to_train(tmp_path: Path) -> None:
    write_classifier(tmp_path, "encoder")
    scorer = new_scorer(tmp_path, ["reward", "harm"], 64, 64)
    scorer(scorer.encode(PROMPTS, RESPONSES)).sum().backward()
    assert scorer.text.form == "pair"
    assert scorer.heads.weight.grad.abs().sum() > 0


def test_the_chat_template_of_a_tokenizer_is_used(tmp_path: Path) -> None:
    tokenizer = write_classifier(tmp_path, "decoder")
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    scorer = load_ready_scorer(tmp_path, ["harm"], 64, 64)
    tokens = scorer.encode(["How?"], ["No."])[0]
    assert tokenizer.decode([*tokens[0], *tokens[1]]) == "<bos>user: How?<eos><bos>assistant: No.<eos>"


@pytest.mark.parametrize(
    ("case", "said"),
    [("labels", "2 labels"), ("two names", "one ready model"), ("policy", "no score head"), ("nothing", "not exist")],
)
def test_what_is_no_ready_scorer_is_refused(reference: Path, tmp_path: Path, case: str, said: str) -> None:
    folder = {"policy": reference, "nothing": tmp_path / "nothing"}.get(case, tmp_path)
    if case in ("labels", "two names"):
        write_classifier(tmp_path, "decoder", labels=2 if case == "labels" else 1)
    names = ["reward", "harm"] if case == "two names" else ["harm"]
    with pytest.raises(InputError, match=said):
        load_ready_scorer(folder, names, 64, 64)


def test_a_damaged_scorer_is_refused(reference: Path, tmp_path: Path) -> None:
    save_scorer(a_scorer(reference), tmp_path)
    content = json.loads((tmp_path / "scorer.json").read_text())
    del content["heads"]
    (tmp_path / "scorer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"scorer\.json cannot be read"):
        load_scorer(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="cut short"):
        load_scorer(tmp_path)

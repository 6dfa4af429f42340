"""Whatever lengths cut is counted and said: before a run, in its record, and by each scorer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_models_beaver import write_checkpoint
from text_kit import SHAPES, TEXTUAL, model_of, tokenizer_of
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as Tokenizer

from cdpo_core.config import ExperimentConfig
from cdpo_core.data.lengths import check_policy_text, length_lines
from cdpo_core.errors import InputError
from cdpo_core.evaluation.cuts import cut_lines, cut_warnings
from cdpo_core.models.beaver import load_beaver
from cdpo_core.models.ready_scorer import load_ready_scorer

LONG = "first " + "How do I bake bread? " * 200
ANSWERS = ["Sure, take flour.", "No."]


def test_counts_become_lines_and_above_a_twentieth_warnings() -> None:
    policy = {"prompts": 100, "prompts_cut": 6, "responses": 100, "responses_cut": 5}
    lengths = {"max_prompt_tokens": 64, "max_response_tokens": 32}
    cut = {"policy": policy | lengths, "scorers": {"harm": {"texts": 1000, "prompts_cut": 0, "responses_cut": 51}}}
    lines = cut_lines(cut)
    assert lines[0].startswith("6 of 100 prompts are cut to policy.max_prompt_tokens = 64")
    assert len(lines) == 4
    assert cut_warnings(cut) == [
        f"{lines[0]} (6%)",
        "51 of 1,000 texts that the harm model read lost the right end of their response (5%)",
    ]
    assert cut_lines({}) == cut_warnings({}) == []


def source(folder: Path) -> Path:
    """60 prompts of which a half are long."""
    rows = [
        {
            "prompt": f"Case {number}: " + (LONG[:2000] if number % 2 else "how?"),
            "response_0": f"Take care of {number}.",
            "response_1": f"Burn {number}.",
            "better_response_id": 0,
            "safer_response_id": 0,
            "is_response_0_safe": True,
            "is_response_1_safe": False,
        }
        for number in range(60)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("base", ["scratch", "chatml"])
def test_the_lengths_are_counted_before_a_run(base: str, tmp_path: Path) -> None:
    policy: dict[str, object] = {"max_prompt_tokens": 64, "vocabulary_size": 300}
    if base != "scratch":
        model_of(tokenizer_of(base), SHAPES[base].ends).save_pretrained(tmp_path / base)
        tokenizer_of(base).save_pretrained(tmp_path / base)
        policy |= {"base": str(tmp_path / base), "template": "chat"}
    config = ExperimentConfig.model_validate(
        {"data": {"source": str(source(tmp_path))}, "policy": policy, "constraints": [{"name": "harm", "limit": 0.0}]}
    )
    prompts, responses, warning = length_lines(config)
    assert prompts.startswith("30 of 60 prompts are cut to policy.max_prompt_tokens = 64")
    assert ("estimated" in prompts) == (base == "scratch")
    assert responses.startswith("0 of 120 responses")
    assert warning.startswith("warning: 30 of 60")
    assert warning.endswith("(50%)")


@pytest.mark.parametrize(("template", "limit", "error"), [(TEXTUAL, 64, "with text"), ("", 9, "leaves no room")])
def test_a_template_that_cannot_serve_is_refused_before_a_run(
    template: str, limit: int, error: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    policy = {"base": str(tmp_path), "template": "chat", "max_prompt_tokens": limit}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = ExperimentConfig.model_validate({"policy": policy, "constraints": [{"name": "harm", "limit": 0.0}]})
    with pytest.raises(InputError, match=error):
        check_policy_text(config)


@pytest.mark.parametrize("form", ["beaver", "chat", "pair"])
def test_a_long_prompt_leaves_its_responses_different(form: str, tmp_path: Path) -> None:
    if form == "beaver":
        write_checkpoint(tmp_path)
    elif form == "chat":
        tokenizer = tokenizer_of("llama3")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    else:
        write_pair_model(tmp_path)
    scorer = load_ready_scorer(tmp_path, ["harm"], 64, 64)
    scores, cut = scorer.score_counted([LONG, LONG, "How?"], [*ANSWERS, "No."])
    assert cut == {"texts": 3, "prompts_cut": 2, "responses_cut": 0}
    one, two = (first + second for first, second in scorer.encode([LONG, LONG], ANSWERS))
    assert len(one) == len(two)
    assert one != two
    assert scores[0] != scores[1]
    if form == "beaver":
        model = load_beaver(tmp_path)
        alone = model.score([LONG, LONG], ANSWERS)
        assert alone[0] != alone[1]


def write_pair_model(folder: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "first", "How", "do", "I", "bake", "bread", "?", "Sure", "No", "."]
    backend = Backend(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    Tokenizer(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=1, **sizes)).save_pretrained(folder)

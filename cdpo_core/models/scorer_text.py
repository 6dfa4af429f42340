"""How ready scorers read a prompt with its response: as a conversation, a chat or a sentence pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cdpo_core.models.beaver import MAX_TOKENS, beaver_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokens that the prompt alone decides, and the rest; the text is both, one after the other.
EncodedText = tuple[tuple[int, ...], tuple[int, ...]]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> list[EncodedText]:
    """One turn as Beaver models read it, the end-of-text token appended as in their training."""
    end = str(tokenizer.eos_token)
    texts = [beaver_text([turn], end, ended=True) for turn in zip(prompts, responses, strict=True)]
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"] if texts else []
    return [((), tuple(tokens)) for tokens in encoded]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], limit: int
) -> list[EncodedText]:
    """User and assistant turn by the tokenizer's chat template, cut from the left to `limit` tokens."""
    encoded: list[EncodedText] = []
    for prompt, response in zip(prompts, responses, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        # The template wrote every special token.
        encoded.append(((), tuple(tokenizer(text, add_special_tokens=False)["input_ids"][-limit:])))
    return encoded


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], limit: int
) -> list[EncodedText]:
    """The tokenizer's own sentence pair with its special tokens, the longer side cut first to `limit` tokens."""
    if not prompts:
        return []
    encoded = tokenizer(
        list(prompts), list(responses), truncation="longest_first", max_length=limit, return_token_type_ids=True
    )
    texts = []
    for tokens, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True):
        first = types.index(1) if 1 in types else len(tokens)
        texts.append((tuple(tokens[:first]), tuple(tokens[first:])))
    return texts

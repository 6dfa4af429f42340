"""How ready scorers read a prompt with its response: as a conversation, a chat or a sentence pair.

Too long a text loses its prompt's left end, and only without any of the prompt its response's right end: responses to
one long prompt stay different texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cdpo_core.models.beaver import MAX_TOKENS, conversation_frame
from cdpo_core.models.text import TextWriter, Written, chat_frames

# The tokens that the prompt alone decides, and the rest; the text is both, one after the other.
EncodedText = tuple[tuple[int, ...], tuple[int, ...]]


class Encoded(NamedTuple):
    """Texts as tokens, and how many of them lost some of their prompt and of their response."""

    texts: list[EncodedText]
    prompts_cut: int
    responses_cut: int


def encode_conversations(writer: TextWriter, prompts: Sequence[str], responses: Sequence[str]) -> Encoded:
    """One turn as Beaver models read it, the end-of-text token appended as in their training."""
    end = str(writer.tokenizer.eos_token)
    frames = [conversation_frame(prompt, response, end) for prompt, response in zip(prompts, responses, strict=True)]
    return _whole(writer.write(frames, MAX_TOKENS, own_start=True))


def encode_chats(writer: TextWriter, prompts: Sequence[str], responses: Sequence[str], limit: int) -> Encoded:
    """User and assistant turn by the tokenizer's chat template, `limit` tokens at most."""
    frames = chat_frames(writer.tokenizer, list(zip(prompts, responses, strict=True)))
    # The template wrote every special token.
    return _whole(writer.write(frames, limit))


def encode_pairs(writer: TextWriter, prompts: Sequence[str], responses: Sequence[str], limit: int) -> Encoded:
    """The tokenizer's own sentence pair with its special tokens, `limit` tokens at most."""
    pairs = writer.pairs(prompts, responses, limit)
    texts = [(tuple(written.tokens[:first]), tuple(written.tokens[first:])) for written, first in pairs]
    return Encoded(texts, *_counts([written for written, _ in pairs]))


def _whole(rows: Sequence[Written]) -> Encoded:
    return Encoded([((), tuple(row.tokens)) for row in rows], *_counts(rows))


def _counts(rows: Sequence[Written]) -> tuple[int, int]:
    return sum(row.cut[0] > 0 for row in rows), sum(row.cut[1] > 0 for row in rows)

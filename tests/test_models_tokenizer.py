"""The tokenizer: exact, deterministic, whole words."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cdpo_core.models.tokenizer import train_tokenizer

ACTIONS, OBJECTS, PLACES = ["cook", "paint", "fix", "sell"], ["cake", "wall", "bike"], ["at home", "in the dark"]
TEXTS = [f"How do I {a} a {o} {p}?" for a in ACTIONS for o in OBJECTS for p in PLACES]


def test_every_text_is_given_back_exactly() -> None:
    tokenizer = train_tokenizer(TEXTS, 320)
    for text in [*TEXTS, "", "  two  spaces", "naïve 漢字 🦫\n\ttab", "never seen: {prompt} % $ \\"]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_special_tokens_and_size() -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    assert len(tokenizer) == 290
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("cook")["input_ids"][0] == 1, "its own calls add <bos>"


def test_frequent_words_become_one_token_with_their_space() -> None:
    tokenizer = train_tokenizer(TEXTS, 2000)
    tokens = tokenizer("How do I paint a wall in the dark?", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in tokens]
    assert pieces == ["How", " do", " I", " paint", " a", " wall", " in", " the", " dark", "?"]
    assert len(tokenizer) < 2000, "no pair is left that occurs twice"


@pytest.mark.parametrize(
    ("texts", "merges"),
    [
        (["ab ab", "cd cd"], ["ab", "cd"]),  # equally frequent: the alphabetically first pair wins
        (["cd ab"] * 3, ["ab", "cd", "Ġab"]),
        (["aaaa"] * 2, ["aa", "aaaa"]),
        (["ab"], []),  # seen once: not merged
    ],
)
def test_merges(texts: list[str], merges: list[str]) -> None:
    tokenizer = train_tokenizer(texts, 259 + len(merges))
    vocabulary = tokenizer.get_vocab()
    learned = sorted((token for token in vocabulary if vocabulary[token] >= 259), key=vocabulary.__getitem__)
    assert learned == merges


def test_merges_agree_with_counting_from_scratch() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(60)]
    tokenizer = train_tokenizer(words, 275)
    spellings = [list(word) for word in words]
    expected = []
    for _ in range(16):
        counts: dict[tuple[str, str], int] = {}
        for spelling in spellings:
            for pair in pairwise(spelling):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        for spelling in spellings:
            position = 0
            while position < len(spelling) - 1:
                if (spelling[position], spelling[position + 1]) == best:
                    spelling[position : position + 2] = ["".join(best)]
                position += 1
    vocabulary = tokenizer.get_vocab()
    learned = sorted((token for token in vocabulary if vocabulary[token] >= 259), key=vocabulary.__getitem__)
    distinct = list(dict.fromkeys("".join(pair) for pair in expected))
    assert learned[: len(distinct)] == distinct


SAVE = """
import sys
sys.path.insert(0, sys.argv[2])
from cdpo_core.models.tokenizer import train_tokenizer
words = [f"word{i % 37} thing{i % 53} end{i % 11}" for i in range(400)]
train_tokenizer(reversed(words) if sys.argv[3] == "1" else words, 500).save_pretrained(sys.argv[1])
"""


def test_two_processes_write_the_same_file(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, str(tmp_path / name), str(root), name],
            env={**os.environ, "PYTHONHASHSEED": name},
        )
        for name in ("0", "1")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    digests = {hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).hexdigest() for name in ("0", "1")}
    assert len(digests) == 1

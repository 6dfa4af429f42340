"""Near duplicates: one question in several spellings is one unit, other questions stay apart."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from config_kit import limited

from cdpo_core.data.near_duplicates import near_duplicates, prompt_units, similarity, word_weights, words_of
from cdpo_core.data.prepare import check_source, prepare_data
from cdpo_core.pipeline import DATA
from cdpo_core.stages import Runtime, pick

VERBS = ["choose", "repair", "store", "clean", "share", "explain", "buy", "sell", "carry", "borrow"]
THINGS = [
    *("bread", "soup", "tents", "bikes", "chess", "paint", "maps", "boats", "jazz", "clay"),
    *("guitars", "rockets", "curtains", "candles", "bottles", "ladders", "radios", "cameras", "pillows", "bridges"),
]
QUESTIONS = [f"How do I {verb} {thing}?" for verb, thing in itertools.product(VERBS, THINGS)]


def units_of(prompts: list[str], threshold: float = 0.7, **groups: list[str]) -> list[str]:
    return prompt_units([f"p{number:06d}" for number in range(len(prompts))], prompts, groups, threshold)


def spellings(question: str, chance: random.Random) -> list[str]:
    word = chance.choice([word for word in question.strip("?").split() if len(word) > 3])
    place = chance.randrange(1, len(word) - 1)
    slip = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return [
        question,
        question.lower().rstrip("?"),
        question.upper() + "!!",
        "Please, " + question[0].lower() + question[1:],
        " " + question.replace(" ", "  ").replace("?", " ?") + "\n",
        question.replace(word, slip),
    ]


def test_six_spellings_of_two_hundred_questions_are_two_hundred_units() -> None:
    chance = random.Random(0)
    prompts = [spelled for question in QUESTIONS for spelled in spellings(question, chance)]
    units = units_of(prompts)
    assert len(prompts) == 1200
    groups = [set(units[start : start + 6]) for start in range(0, 1200, 6)]
    assert sum(len(group) == 1 for group in groups) >= 190
    assert len(set(units)) <= 210
    assert max(Counter(units).values()) == 6  # no two questions in one unit


@pytest.mark.parametrize(
    "prompts",
    [
        QUESTIONS,
        [f"How do I repair bike number {number}?" for number in range(300)],
        [f"{number} + {number + 1} = ?" for number in range(300)],
        ["Below is an instruction. Write a response to it that is as helpful as can be. " + q for q in QUESTIONS],
        [f"怎么修理{thing}" for thing in "船车灯桥琴门窗床书包鞋伞"],
        [f"How do I repair {thing}?" for thing in ("boats", "boots", "goats", "coats", "moats")],
    ],
    ids=["one word differs", "a number differs", "sums", "behind one instruction", "no spaces", "words a letter apart"],
)
def test_other_questions_of_one_template_stay_apart(prompts: list[str]) -> None:
    assert len(set(units_of(prompts))) == len(prompts)


def test_accents_case_punctuation_and_order_are_spelling() -> None:
    prompts = [
        *QUESTIONS,
        "Où est le café d'Amélie?",
        "ou est le cafe damelie",
        "What's the colour of a ripe banana, please?",
        "whats the colour of a ripe banana",
        "怎么修理船？",
        "怎么修理船",
    ]
    units = units_of(prompts)
    assert [left == right for left, right in zip(units[-6::2], units[-5::2], strict=True)] == [True] * 3
    assert words_of("Please!") == ["please"]


@pytest.mark.parametrize("threshold", [0.001, 0.995, 1.0])
def test_every_threshold_that_the_config_takes_can_be_searched(threshold: float) -> None:
    spelled = ["Repair old boats?", "repair OLD boats", "Buy new maps", "Sell paint"]
    assert units_of(spelled, threshold)[0] == units_of(spelled, threshold)[1]
    assert len(set(units_of(spelled, threshold))) == 3


def test_what_is_found_is_what_an_exact_comparison_of_all_pairs_finds() -> None:
    chance = np.random.default_rng(3)
    words = [f"w{'abcdefghij'[number % 10] * 2}{'klmnopqrst'[number // 10] * 2}" for number in range(100)]
    texts = [list(chance.choice(words, 12, replace=False)) for _ in range(60)]
    texts += [[*text[:-1], words[chance.integers(100)]] for text in texts]
    prompts = [" ".join(text) for text in texts]
    sets = [frozenset(words_of(prompt)) for prompt in prompts]
    weights = word_weights(sets)
    expected = {
        pair
        for pair in itertools.combinations(range(len(prompts)), 2)
        if similarity(sets[pair[0]], sets[pair[1]], weights) >= 0.7
    }
    found = set(near_duplicates(prompts, 0.7))
    assert len(expected) >= 40
    assert found <= expected
    assert len(found) >= 0.95 * len(expected)


def test_the_similarity_is_the_weighted_share_of_shared_words() -> None:
    weights = word_weights([["how", "a"], ["how", "b"], ["how", "c"], ["how", "a", "d"]])
    assert weights == {"how": 0.0, "a": 1.0, "b": 4.0, "c": 4.0, "d": 4.0}
    assert similarity(frozenset("ab"), frozenset("ad"), weights) == pytest.approx(1 / 9)
    assert similarity(frozenset(["how"]), frozenset(["how"]), weights) == 0


def test_groups_join_what_is_said_and_what_is_found() -> None:
    prompts = [*QUESTIONS, QUESTIONS[0].lower(), "Something else altogether"]
    units = units_of(prompts, p000201=["a"], p000003=["a", "b"], p000007=["b"])
    assert units[201] == units[3] == units[7] == "p000003"
    assert units[200] == units[0] == "p000000"
    assert len(set(units)) == 199
    assert len(set(units_of(prompts, 0.0, p000003=["a"], p000007=["a"]))) == 201


def write_rows(path: Path, prompts: list[str], **fields: list[Any]) -> Path:
    rows = [
        {
            "prompt": prompt,
            "response_0": f"Like this: {number}.",
            "response_1": f"I will not: {number}.",
            "better_response_id": number % 2,
            "safer_response_id": 1,
            "is_response_0_safe": number % 3 > 0,
            "is_response_1_safe": True,
            **{name: values[number] for name, values in fields.items()},
        }
        for number, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, out: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    config = limited({"data": {"source": str(path)}})
    out.mkdir()
    prepare_data(pick(config, DATA.fields), {"source": path}, out, Runtime())
    return pd.read_parquet(out / "prompts.parquet"), json.loads((out / "summary.json").read_text())


def test_the_data_artifact_names_units_and_keeps_them_on_one_side(tmp_path: Path) -> None:
    chance = random.Random(0)
    prompts = [spelled for question in QUESTIONS for spelled in spellings(question, chance)[:5]]
    table, summary = prepared(write_rows(tmp_path / "pairs.jsonl", prompts), tmp_path / "out")
    # Two of the spellings differ in white space alone, which is one prompt.
    assert (summary["prompts"], summary["units"], summary["largest_unit"]) == (len(table), 200, len(table) // 200)
    assert (table.groupby("unit")[["split", "held_out"]].nunique() == 1).all(axis=None)
    assert (table.groupby("unit")["prompt_id"].min() == sorted(set(table["unit"]))).all()
    turned, _ = prepared(write_rows(tmp_path / "turned.jsonl", prompts[::-1]), tmp_path / "turned")
    unit_of = turned.set_index("prompt_id")["unit"]
    assert (table.set_index("prompt_id")["unit"] == unit_of.loc[table["prompt_id"]]).all()


def test_a_group_column_says_it_in_any_format_and_as_number_or_text(tmp_path: Path) -> None:
    numbers = [number // 2 if number < 100 else None for number in range(200)]
    for name, groups in (("numbers", numbers), ("texts", [None if n is None else str(n) for n in numbers])):
        table, summary = prepared(write_rows(tmp_path / f"{name}.jsonl", QUESTIONS, group=groups), tmp_path / name)
        assert (summary["prompts"], summary["units"], summary["near_duplicates"]) == (200, 150, 100)
        units = table.set_index("prompt")["unit"]
        assert units[QUESTIONS[0]] == units[QUESTIONS[1]] != units[QUESTIONS[2]]
    dialogues = [
        {
            "chosen": f"\n\nHuman: {q}\n\nAssistant: yes {i}",
            "rejected": f"\n\nHuman: {q}\n\nAssistant: no",
            "group": i % 50,
        }
        for i, q in enumerate(QUESTIONS)
    ]
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    assert prepared(path, tmp_path / "hh")[1]["units"] == 50


def test_check_data_says_what_it_found_and_warns(tmp_path: Path) -> None:
    prompts = [spelled for question in QUESTIONS for spelled in (question, question.lower(), question + "!")]
    config = limited({"data": {"source": str(write_rows(tmp_path / "pairs.jsonl", prompts))}})
    report = check_source(config)
    assert (report.prompts, report.units, report.near_duplicates, report.largest_unit) == (600, 200, 600, 3)
    told = "\n".join(report.lines())
    assert "600 prompts in 200 units, the largest of 3" in told
    assert "'How do I choose bread?' and 'how do i choose bread?'" in told
    assert any("600 prompts are 200 questions" in note for note in report.notes)
    plain = check_source(limited({"data": {"source": str(write_rows(tmp_path / "plain.jsonl", QUESTIONS))}}))
    assert (plain.units, plain.near_duplicates) == (200, 0)
    assert not any("several spellings" in note for note in plain.notes)


def test_splits_are_refused_by_their_units(tmp_path: Path) -> None:
    from cdpo_core.errors import InputError

    path = write_rows(tmp_path / "pairs.jsonl", QUESTIONS, group=[number % 10 for number in range(200)])
    with pytest.raises(InputError, match="too few prompts to split"):
        check_source(limited({"data": {"source": str(path)}}))

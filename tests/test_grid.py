"""The grid of a sweep and the lists of the command line."""

from __future__ import annotations

import pytest
from config_kit import experiment_config

from cdpo_core.errors import InputError
from flows.grid import combinations, parse_limits, parse_seeds, words

CONFIG = experiment_config()


def test_grid_is_every_combination_in_order() -> None:
    (alone,) = combinations(CONFIG, [], [])
    assert (alone.place, alone.settings, alone.config) == ((), {}, CONFIG)
    found = combinations(CONFIG, [3, 5], ["dpo.beta=0.5,2", "dpo.labels=hard"])
    assert [item.place for item in found] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert [item.settings for item in found] == [
        {"seed": seed, "dpo.beta": beta, "dpo.labels": "hard"} for seed in (3, 5) for beta in (0.5, 2.0)
    ]
    assert [(item.config.seed, item.config.dpo.beta, item.config.dpo.labels) for item in found] == [
        (3, 0.5, "hard"), (3, 2.0, "hard"), (5, 0.5, "hard"), (5, 2.0, "hard"),
    ]  # fmt: skip
    assert words(found[1].settings) == "seed = 3, dpo.beta = 2.0, dpo.labels = hard"


@pytest.mark.parametrize(
    ("seeds", "vary", "said"),
    [
        ([0, 0], [], "given twice"),
        ([], ["dpo.beta=1", "dpo.beta=2"], "varied twice"),
        ([1], ["seed=2"], "varied twice"),
        ([], ["=1"], "no setting"),
        ([], ["dpo.beta"], "no setting"),
        ([], ["dpo.beta=1,,2"], "empty"),
        ([], ["dpo.beta=1,1.0"], "the same experiment"),
        ([], ["dpo.beta=1,-1"], "greater than 0"),
        ([], ["dpo.bta=1,2"], "dpo.bta"),
        ([], ["store.uri=a,b"], "changes no result"),
        ([], ["constraints.0.limit=1,2"], "--limits varies"),
        (list(range(101)), [], "101 combinations"),
    ],
)
def test_what_is_no_grid_is_refused(seeds: list[int], vary: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        combinations(CONFIG, seeds, vary)


def test_limits_and_seeds_are_lists_of_numbers() -> None:
    assert parse_limits("-1, -0.5,2e-1") == [-1.0, -0.5, 0.2]
    assert parse_seeds("3, 0,12") == [3, 0, 12]
    for wrong in ("1,a", "-1", "1.5", "1,,2", "1,1"):
        with pytest.raises(InputError):
            parse_seeds(wrong)

"""The grid of a sweep and the lists of the command line."""

from __future__ import annotations

import pytest

from cdpo_core.errors import InputError
from flows.grid import grid, parse_limits, parse_seeds


def test_grid_is_every_combination_in_order() -> None:
    assert grid() == [{}]
    assert grid("0,1", ["dpo.beta=1,2"]) == [
        {"seed": seed, "dpo.beta": beta} for seed in ("0", "1") for beta in ("1", "2")
    ]
    assert parse_limits("-1, -0.5,2e-1") == [-1.0, -0.5, 0.2]
    for seeds, settings in [
        ("0,,1", []),
        ("0,0", []),
        ("", ["a=1", "a=2"]),
        ("", ["=1"]),
        (",".join(map(str, range(101))), []),
    ]:
        with pytest.raises(InputError):
            grid(seeds, settings)


def test_seeds_are_whole_numbers() -> None:
    assert parse_seeds("3, 0,12") == [3, 0, 12]
    for wrong in ("1,a", "-1", "1.5", "1,,2", "1,1"):
        with pytest.raises(InputError):
            parse_seeds(wrong)

"""Spending δ over every test that is ever made on the same held-out prompts.

Who tests again and again on the same prompts passes in the end. So the k-th family of tests that meets a prompt may err
with probability δ_k = 6δ/(π²k²) only, and the m tests of one family with δ_k/m each: Σ_k m·δ_k/m ≤ δ bounds the
probability that any policy above its limit passed any test on these prompts (union bound; alpha spending after Foster
& Stine, JRSS-B 2008). It holds for tests that do not depend on the prompts' costs, and for going on until one passes,
since the policies tried after nothing but failures are one sequence; not for a policy that was made by the figures of
an earlier test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Literal

Spending = Literal["squares", "none"]


@dataclass(frozen=True)
class Entry:
    """One family of tests as the ledger knows it.

    Attributes:
        family: what the tests belong to, an experiment or a sweep.
        prompts: digests of the prompts it may test on; None when they cannot be told.
    """

    family: str
    prompts: Set[str] | None


def uses(family: str, prompts: Set[str], earlier: Iterable[Entry]) -> int:
    """k = 1 + the other families among the earlier entries that share any prompt with these.

    An entry whose prompts cannot be told counts as sharing some. Of the families that meet one prompt, the j-th to do
    so finds the j − 1 before it, so its k is at least j.

    Args:
        family: whose use this is; its own earlier entries do not count.
        prompts: digests of its prompts.
        earlier: every entry that was made before.
    """
    sharing = {
        entry.family
        for entry in earlier
        if entry.family != family and (entry.prompts is None or not prompts.isdisjoint(entry.prompts))
    }
    return 1 + len(sharing)


def share_of(delta: float, used: int, spending: Spending, tests: int = 1) -> float:
    """The level of each of a family's tests: 6δ/(π²k²m) with `squares`, δ itself with `none`.

    Args:
        delta: what may be spent on these prompts in all, in (0, 0.5).
        used: k >= 1, which use of the prompts this is (`uses`).
        spending: the rule.
        tests: m >= 1, how many tests the family makes.

    Raises:
        ValueError: used or tests is below 1.
    """
    if used < 1 or tests < 1:
        raise ValueError(f"a use and its tests are counted from 1, not {used} and {tests}")
    return delta if spending == "none" else 6 * delta / (math.pi * used) ** 2 / tests

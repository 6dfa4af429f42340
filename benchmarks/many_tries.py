"""How often some policy of many passes when each lies exactly at its limit and all are tested from one store.

    python benchmarks/many_tries.py [--draws 4000] [--seeds 10]

Ten seeds share their prompts only in part, as splits of one data set do. With `certificate.spending: squares` some
policy passes in at most δ of all stores; with `none` the chance grows with every seed. The costs are normal and the
test is Student's, which errs at exactly its level there: the certificate's own tests err less
(`certificate_calibration.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from cdpo_core.dual.spending import Spending, share_of
from cdpo_core.randomness import numpy_stream
from tasks.ledger import Ledger

PROMPTS, HELD_OUT = 500, 100
DELTA = 0.05
# Deviation of a prompt's cost that all policies share, and of each policy's own.
SHARED, OWN = 1.0, 1.0


class Shelf:
    """The records of a store that lives as long as this object."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Any]] = {}

    def put_record(self, name: str, record: dict[str, Any]) -> bool:
        """Keep a record unless there is one."""
        return self._records.setdefault(name, record) is record

    def get_record(self, name: str) -> dict[str, Any] | None:
        """A record, or None."""
        return self._records.get(name)

    def record_names(self, prefix: str) -> list[str]:
        """Sorted names that start so."""
        return sorted(name for name in self._records if name.startswith(prefix))


def some_pass(draws: int, spending: Spending, seeds: int = 10, delta: float = DELTA) -> float:
    """Share of stores in which any of the seeds' policies passes, each with its true mean cost at the limit.

    Args:
        draws: stores, each with prompts of its own.
        spending: the rule.
        seeds: experiments a store.
        delta: what each asks for.
    """
    passed = 0
    for draw in range(draws):
        generator, ledger = numpy_stream(draw, "many tries"), Ledger(Shelf())
        shared = SHARED * generator.standard_normal(PROMPTS)
        for seed in range(seeds):
            held_out = generator.permutation(PROMPTS)[:HELD_OUT]
            use = ledger.draw(str(seed), {str(place) for place in held_out})
            costs = shared[held_out] + OWN * generator.standard_normal(HELD_OUT)
            quantile = stats.t.ppf(1 - share_of(delta, use.uses, spending), HELD_OUT - 1)
            if costs.mean() + quantile * costs.std(ddof=1) / HELD_OUT**0.5 <= 0:
                passed += 1
                break
    return passed / draws


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both rules' rates; returns 0 when the default's is in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args(arguments)
    most = DELTA + 2 * float(np.sqrt(DELTA * (1 - DELTA) / options.draws))
    rates = {rule: some_pass(options.draws, rule, options.seeds) for rule in ("squares", "none")}
    for rule, rate in rates.items():
        print(f"{rule}: some of {options.seeds} policies at the limit passes in {rate:.4f} of {options.draws} stores")
    print(f"in order with squares: at most {most:.4f}")
    return 0 if rates["squares"] <= most else 1


if __name__ == "__main__":
    sys.exit(main())

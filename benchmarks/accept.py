"""The acceptance table in full, with figures: each promise is run, measured and judged.

    make accept
    python benchmarks/accept.py --rows 1,4,5 --work /tmp/accept

Finished runs are kept in the work folder, so the same command continues where it was broken off. Each row is printed
as soon as it is known; `accept.json` and `accept.md` in the work folder hold the table. Over an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from acceptance import certificates, chain, deployed, killed, optimum, outside, quality, rivals, several_costs
from acceptance.lab import ROOT, Lab
from acceptance.row import Row

ROWS: dict[int, Callable[[Lab], Row]] = {
    1: quality.demo,
    2: quality.truth_learned,
    3: quality.truth_oracle,
    4: chain.repeat,
    5: chain.other_limit,
    6: chain.sweep,
    7: killed.killed,
    8: chain.on_s3,
    9: deployed.deployed,
    10: outside.real_text,
    11: outside.bad_input,
    12: optimum.near_optimum_oracle,
    13: optimum.near_optimum_learned,
    14: optimum.lambda_behaves,
    15: optimum.infeasible,
    16: rivals.compared,
    17: several_costs.two_costs,
    18: certificates.calibrated,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen rows; returns 0 when none of them failed."""
    options = _options(arguments)
    lab = Lab(options.work or Path(tempfile.mkdtemp(prefix="cdpo-accept-")), options.data)
    print(f"work folder: {lab.work}", flush=True)
    rows = []
    for number in options.rows:
        row = _judged(lab, number)
        rows.append(row)
        print(f"\n{row.number:>2}  {row.verdict:<7}  {row.what}", flush=True)
        print(f"    measured: {row.measured}\n    target:   {row.target}", flush=True)
        _write(lab, rows)
    failed = [row.number for row in rows if row.passed is False]
    words = f"rows that failed: {', '.join(map(str, failed))}" if failed else "no row failed"
    print(f"\n{words}; the table is in {lab.work / 'accept.md'}")
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="accept", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=_numbers, default=list(ROWS), help="such as 1,2,5 (all)")
    parser.add_argument("--work", type=Path, help="folder of the runs; what is finished in it is kept (a fresh one)")
    text = ROOT.parent / "shared" / "data" / "xstest_pairs.jsonl"
    parser.add_argument("--data", type=Path, default=text, help="preference file of row 10 (%(default)s)")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if unknown := [number for number in numbers if number not in ROWS]:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]}")
    return numbers


def _judged(lab: Lab, number: int) -> Row:
    """The row; one that cannot be measured has failed, and the next ones are still tried."""
    try:
        return ROWS[number](lab)
    except Exception as error:
        traceback.print_exc()
        what = (ROWS[number].__doc__ or "").splitlines()[0]
        return Row(number, what, f"could not be measured: {type(error).__name__}: {error}"[:300], "", False)


def _write(lab: Lab, rows: Sequence[Row]) -> None:
    records = [{**vars(row), "verdict": row.verdict} for row in rows]
    runs = {
        path.stem: {name: done[name] for name in ("code", "seconds", "cpu_seconds")}
        for path in sorted((lab.work / "done").glob("*.json"))
        if "cpu_seconds" in (done := json.loads(path.read_text()))
    }
    seeds = {
        name: quality.figures(getter(lab, seed))
        for word, getter in (("learned", quality.learned), ("oracle", quality.oracle))
        for seed in quality.SEEDS
        if (name := f"{word}-{seed}") in runs
    }
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    table = {"time": time.strftime("%Y-%m-%d %H:%M"), "machine": machine, "rows": records, "runs": runs, "seeds": seeds}
    (lab.work / "accept.json").write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    lines = ["| # | what | measured | target | |", "|---|---|---|---|---|"]
    lines += [f"| {row.number} | {row.what} | {row.measured} | {row.target} | {row.verdict} |" for row in rows]
    (lab.work / "accept.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())

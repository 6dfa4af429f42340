"""What a sweep costs beside one experiment, and that its verdicts are those of separate runs.

    python benchmarks/sweep_cost.py
    python benchmarks/sweep_cost.py --apart --work /tmp/sweep-cost
    python benchmarks/sweep_cost.py --config tiny --limits -0.3,-0.25,-0.2,-0.15,-0.1,-0.05,0,0.3

Both sides start from an empty state folder, one after the other. Processor time is of the command and all it waited
for. `--apart` also runs every limit in a store of its own and compares status, λ and the policy's digest. Finished
runs are kept in the work folder: the same command continues.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acceptance.lab import Lab, Ran

LIMITS = "-1,-0.9,-0.8,-0.7,-0.6,-0.5,-0.4,-0.3"
MOST = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both sides and their ratio; returns 0 when the sweep costs at most 3 × and every verdict is the same."""
    options = _options(arguments)
    lab = Lab(options.work or Path(tempfile.mkdtemp(prefix="cdpo-sweep-cost-")), Path("none"))
    print(f"work folder: {lab.work}", flush=True)
    one = lab.run("one", ["run", options.config], "one", fresh=True)
    _say("one experiment", one)
    limits = options.limits.split(",")
    sweep = lab.run("sweep", ["sweep", options.config, f"--limits={options.limits}"], "sweep", fresh=True)
    _say(f"a sweep over {len(limits)} limits", sweep)
    children = sweep.result["children"]
    _say_parts(sweep, children)
    ratio = sweep.cpu_seconds / one.cpu_seconds
    print(f"the sweep costs {ratio:.2f} × one experiment (at most {MOST:g} ×)")
    same = not options.apart or _apart(lab, options.config, children)
    return 0 if ratio <= MOST and len(children) == len(limits) and same else 1


def _apart(lab: Lab, config: str, children: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each child ends as its limit does alone, in a store of its own."""
    total, differ = 0.0, []
    for child in children:
        limit = f"{child['limit']:g}"
        alone = lab.run(f"alone{limit}", ["run", config, f"--limit={limit}"], f"alone{limit}", fresh=True)
        total += alone.cpu_seconds
        found, expected = _verdict(alone.result), _verdict(child)
        print(f"  limit {limit:>5}: {expected[0]:14} λ = {expected[1]}  {'the same' if found == expected else found}")
        differ += [limit] if found != expected else []
    words = f"{len(differ)} of {len(children)} differ ({', '.join(differ)})" if differ else "the same verdicts"
    print(f"apart: {total:.0f} CPU s in all; {words}", flush=True)
    return not differ


def _verdict(result: Mapping[str, Any]) -> tuple[str, float | None, str]:
    return result["status"], result["lambda"], (result["policy"] or {}).get("digest", "")


def _say(what: str, ran: Ran) -> None:
    print(f"{what}: {ran.cpu_seconds:.1f} CPU s, {ran.seconds:.0f} s, exit {ran.code}", flush=True)


def _say_parts(sweep: Ran, children: Sequence[Mapping[str, Any]]) -> None:
    """Where the time of the children after the first went, by kind of stage."""
    parts: dict[str, float] = {}
    for child in children[1:]:
        for stage in child["stages"]:
            if not stage["cached"]:
                kind = stage["name"].split(" at ")[0].split(":")[0]
                parts[kind] = parts.get(kind, 0.0) + stage["seconds"]
    others = max(1, len(children) - 1)
    for kind, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {kind:24} {seconds / others:6.1f} s a child after the first")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="testbed", help="preset or file (%(default)s)")
    parser.add_argument("--limits", default=LIMITS, help="limits of the sweep (%(default)s)")
    parser.add_argument("--apart", action="store_true", help="also run each limit alone, and compare the verdicts")
    parser.add_argument("--work", type=Path, help="folder of the runs; a temporary one if not given")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""What Prefect, MLflow and the artifact store cost: `cdpo run` from nothing, and the same stages from the core alone.

    python benchmarks/orchestration.py
    python benchmarks/orchestration.py --config tiny --turns 3

Both sides start a new interpreter, compute the same bytes and take turns; wall-clock and processor time are printed,
and the overhead's share. The report (figures, tables, closing words), which only the run makes, counts as overhead.
A run of `tiny` before, not timed, reads the libraries, so that the first side does not wait for a cold disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("CDPO_HOME", "PREFECT_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI")


def main() -> None:
    """Print a line for each turn, then the medians and the overhead."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="testbed", help="preset or file (%(default)s)")
    parser.add_argument("--turns", type=int, default=1, help="of each side (%(default)s)")
    options = parser.parse_args()
    turns = []
    with tempfile.TemporaryDirectory(prefix="cdpo-orchestration-") as work:
        timed(run_of("tiny"), elsewhere(Path(work)), (0, 3))
    for turn in range(options.turns):
        with tempfile.TemporaryDirectory(prefix="cdpo-orchestration-") as work:
            turns.append(one_turn(options.config, Path(work)))
        (run, run_cpu), (core, core_cpu) = turns[-1]
        print(f"turn {turn + 1}: run {run:.1f} s ({run_cpu:.1f} CPU s), core alone {core:.1f} s ({core_cpu:.1f} CPU s)")
    for name, at in (("wall", 0), ("CPU", 1)):
        run, core = (statistics.median(turn[side][at] for turn in turns) for side in (0, 1))
        over = run - core
        print(
            f"{name:4} run {run:.1f} s, core alone {core:.1f} s: {over:.1f} s are overhead, {over / run:.1%} of the run"
        )


def one_turn(config: str, work: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """(wall, processor) seconds of the run and of the core alone."""
    run = timed(run_of(config), elsewhere(work / "home"), (0, 3))
    threads = threads_of(config)
    core = [
        sys.executable,
        str(ROOT / "benchmarks" / "core_alone.py"),
        str(work / "home" / "store"),
        str(work / "core"),
        threads,
    ]
    return run, timed(core, {**elsewhere(work), "PYTHONPATH": str(ROOT)}, (0,))


def run_of(config: str) -> list[str]:
    """The command of a run."""
    return [sys.executable, "-m", "flows.cli", "run", config]


def elsewhere(home: Path) -> dict[str, str]:
    """The environment with its state in `home` and no server named."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    return {**kept, "CDPO_HOME": str(home)}


def timed(command: list[str], environment: dict[str, str], codes: tuple[int, ...]) -> tuple[float, float]:
    """(wall, processor) seconds of a command and all that it waited for."""
    started = time.monotonic()
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in codes:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime


def threads_of(config: str) -> str:
    """The preset's number of threads: bytes are the same for the same number only."""
    from cdpo_core.config_loading import load_config

    return str(load_config(config, {}).compute.threads)


if __name__ == "__main__":
    main()

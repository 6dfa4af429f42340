"""Prefect's server as this project starts it: its garbage is collected beside the event loop."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flows.prefect_server import COMMAND

PROGRAM = """
import sys, threading

class Garbage:
    def __init__(self):
        self.itself = self

    def __del__(self):
        ended.append(threading.current_thread() is threading.main_thread())
        done.set()

ended, done = [], threading.Event()
for _ in range(100_000):
    Garbage()
assert done.wait(60)
assert ended and not any(ended), "garbage was collected on the main thread"
print(__name__, sys.argv[1:])
"""


def test_garbage_is_collected_beside_the_main_thread(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ran = subprocess.run(
        [*COMMAND, "program", "--port", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[0] == "__main__ ['--port', '1']"

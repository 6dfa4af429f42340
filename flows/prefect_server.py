"""A program of Prefect's server, run behind the guard, and so that it does not stand still for a minute on SQLite.

    python -m flows.prefect_server prefect server start --port 4200

Python collects garbage on whichever thread makes an object. On the event loop's thread that may be a cursor left by a
write that SQLite refused; to end it is to wait for its connection, which waits for the lock that a request of the same
event loop holds: all of them wait until SQLite gives up after 60 s. On a thread of its own the collection waits alone.
"""

from __future__ import annotations

import gc
import runpy
import sys
import threading
import time

from flows.page_guard import guard_uvicorn
from flows.prefect_database import place_empty_database

COMMAND = [sys.executable, "-m", "flows.prefect_server"]
YOUNG_SECONDS, ALL_SECONDS = 1.0, 60.0


def main() -> None:
    """Run the module that is named first, with the arguments behind it, on a database that needs no making."""
    place_empty_database()
    guard_uvicorn()
    collect_garbage_beside()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def collect_garbage_beside() -> None:
    """Collect this process's garbage on a thread of its own from now on, the young every second."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    collected = time.monotonic()
    while True:
        time.sleep(YOUNG_SECONDS)
        everything = time.monotonic() - collected >= ALL_SECONDS
        gc.collect(2 if everything else 1)
        collected = time.monotonic() if everything else collected


if __name__ == "__main__":
    main()

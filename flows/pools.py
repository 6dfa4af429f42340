"""The work pools, by name.

Parents of sweeps wait for their children, which run in `POOL`; in a pool of their own they take no slot that a child
needs, so that a concurrency limit can never leave every slot to a parent.
"""

from __future__ import annotations

POOL = "cdpo"
SWEEP_POOL = "cdpo-sweeps"

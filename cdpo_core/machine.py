"""The machine a stage computes on: device, threads, determinism. Nothing here enters a key."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime


def use_machine(runtime: Runtime) -> Runtime:
    """Set torch's threads and determinism; returns the runtime with `auto` resolved to a device.

    Equal seeds give equal bytes for the same device and thread count.
    """
    # cuBLAS reads it when CUDA starts; without, it may add in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(runtime.threads or os.cpu_count() or 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode also fills new memory, which nothing here reads before it writes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(runtime, device=device)

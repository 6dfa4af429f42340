"""How a stage's function is called: on which device, with which threads and determinism. It is part of every key.

What a record says of the machine is in `cdpo_core.provenance`, which is in none.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime, Slice


def call(function: tuple[str, str], config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Compute a stage here and now.

    Args:
        function: its (module, name), imported when it has to compute and not before.
        config, inputs, out, runtime: its arguments; the machine is set up as the runtime says.
    """
    module, name = function
    getattr(importlib.import_module(module), name)(config, inputs, out, use_machine(runtime))


def use_machine(runtime: Runtime) -> Runtime:
    """Set torch's threads and determinism; returns the runtime with `auto` resolved to a device.

    Equal seeds give equal bytes for the same device and thread count.
    """
    import torch

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

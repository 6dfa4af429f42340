"""Random streams, each named by (seed, stage, step) and by nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for the named stream; equal names give equal seeds on every machine."""
    name = "/".join([str(seed), *map(str, stream)])
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def numpy_stream(seed: int, *stream: str | int) -> np.random.Generator:
    """A numpy generator for the named stream."""
    return np.random.default_rng(stream_seed(seed, *stream))


def torch_stream(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU torch generator for the named stream."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *stream))

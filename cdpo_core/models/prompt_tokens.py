"""Prompts as a policy read them, kept beside its responses: what trains on these reads them and renders nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILE = "prompt_tokens.parquet"
SCHEMA = pa.schema([("prompt_id", pa.string()), ("tokens", pa.list_(pa.int32()))])


def write_prompt_tokens(prompt_ids: Sequence[str], tokens: Sequence[Sequence[int]], folder: Path) -> None:
    """Write prompt_tokens.parquet: prompt_id, tokens."""
    columns = {"prompt_id": list(prompt_ids), "tokens": list(map(list, tokens))}
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE)


def read_prompt_tokens(folder: Path) -> dict[str, list[int]]:
    """Prompt -> tokens, as `write_prompt_tokens` kept them."""
    table = pq.read_table(folder / FILE)
    return dict(zip(table["prompt_id"].to_pylist(), table["tokens"].to_pylist(), strict=True))
